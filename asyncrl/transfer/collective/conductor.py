"""The trainer's end of broadcasts: who takes part, in which group, and when."""

from __future__ import annotations

import asyncio
import logging
import secrets
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass

import msgspec
from torch import Tensor

from asyncrl.event_loop import cancelled
from asyncrl.transfer.collective.group import STALL_S, Group, own_device, serve_store, told
from asyncrl.transfer.shelf import NOT_YET_S
from asyncrl.wire import messages as m
from asyncrl.wire.rpc import RpcError

log = logging.getLogger(__name__)

GATHER_S = 5.0
"""Longest wait of those who have asked for a version for members of the last group that have not yet."""
ABANDON_S = 2 * STALL_S
"""Without a bucket, after which a broadcast that does not even fail is left to itself."""
_POLL_S = 1.0


@dataclass(frozen=True, slots=True)
class _Ask:
    request: m.Join
    answer: asyncio.Future[m.Gathered]


Asks = dict[str, _Ask]
"""By the names of members."""


class Conductor:
    """Belongs to the event loop in which it is made. One broadcast at a time, to all that want the version.

    A group stays from version to version while its members are the same and nothing fails. When one is lost
    in the middle of a broadcast, that ends for all with an error; who is left asks again, and is in a new
    group, of half as many at most: whoever never gets through must not keep the others from it.

    bind, advertise: the address at which this host listens, and the one by which others reach it.
    find: the number of a version and its payload, uint8[N], by its identity; raises `RpcError` when it is
        gone.
    count: is told the bytes of each version that has been sent.
    """

    def __init__(
        self,
        bind: str,
        advertise: str,
        find: Callable[[str], tuple[int, Tensor]],
        count: Callable[[int], None],
    ) -> None:
        self._bind = bind
        self._advertise = advertise
        self._find = find
        self._count = count
        self._asks: Asks = {}
        """The last of each member, answered or not: an answer may get lost."""
        self._holds: dict[str, int] = {}
        """Of each member that broadcasts wait for, the version that it has; they are of newer ones."""
        self._at_most: int | None = None
        """So many take part in the next broadcast, after one that has failed."""
        self._gathered: m.Gathered | None = None
        """The group that has not failed, as rank 0 is told of it."""
        self._group: Group | None = None
        self._news = asyncio.Event()
        self._task = asyncio.create_task(self._conduct(), name="weights broadcasts")

    async def join(self, request: m.Join) -> m.Answer:
        """Raises `RpcError` for a version that is gone."""
        self._find(request.want)
        if self._task.done():
            raise RpcError(f"no weights are broadcast any more: {self._task.exception()!r}")
        ask = self._asks.get(request.member)
        if ask is None or ask.request != request:
            ask = _Ask(request, asyncio.get_running_loop().create_future())
            self._asks.pop(request.member, None)  # who asks again comes after all others
            self._asks[request.member] = ask
            self._news.set()
        await asyncio.wait([ask.answer], timeout=NOT_YET_S)
        return ask.answer.result() if ask.answer.done() else m.NotYet(is_coming=True)

    async def close(self) -> None:
        with suppress(Exception):  # told to those who have asked
            await cancelled(self._task)
        self._leave_group()

    async def _conduct(self) -> None:
        while True:
            asks = await self._gather()
            try:
                await self._broadcast(asks)
                self._widen()
            except Exception as error:  # noqa: BLE001 - whatever torch raises where a member is lost
                log.warning("weights were not broadcast to %s: %s", ", ".join(sorted(asks)), error)
                self._leave_group()
                self._at_most = max(1, len(asks) // 2)
                for name, ask in asks.items():
                    self._holds[name] = -1  # whoever lives asks again, and the others may wait for it
                    if not ask.answer.done():
                        ask.answer.set_exception(RpcError(str(error)))
                        ask.answer.exception()  # nobody may be left to hear it

    def _widen(self) -> None:
        if self._at_most is not None:
            twice = 2 * self._at_most
            self._at_most = twice if twice < len(self._asks) else None

    # ---- who -------------------------------------------------------------------------------------------

    async def _gather(self) -> Asks:
        """Who takes part in the next broadcast: all that want the newest of the versions that are wanted."""
        until_s = None
        while True:
            self._news.clear()
            waiting = {name: ask for name, ask in self._asks.items() if not ask.answer.done()}
            if not waiting:
                await self._news.wait()
                continue
            until_s = until_s or time.monotonic() + GATHER_S
            newest = max(waiting.values(), key=self._version)
            asks = {n: ask for n, ask in waiting.items() if ask.request.want == newest.request.want}
            late = {n for n, held in self._holds.items() if held < self._version(newest)} - waiting.keys()
            if not late or time.monotonic() >= until_s:
                for name in late:
                    del self._holds[name], self._asks[name]
                return dict(list(asks.items())[: self._at_most])
            with suppress(TimeoutError):
                async with asyncio.timeout(max(0.0, until_s - time.monotonic())):
                    await self._news.wait()

    def _version(self, ask: _Ask) -> int:
        try:
            return self._find(ask.request.want)[0]
        except RpcError:  # gone since it was asked for; its own broadcast says so
            return -1

    # ---- a broadcast -----------------------------------------------------------------------------------

    async def _broadcast(self, asks: Asks) -> None:
        want = next(iter(asks.values())).request.want
        version, payload = self._find(want)
        device, store = own_device(), None
        if not self._is_the_group(asks):
            self._leave_group()
            store = serve_store(self._bind)
            devices = [told(device), *(ask.request.device for ask in asks.values())]
            name, where = secrets.token_hex(8), (self._advertise, store.port)
            self._gathered = m.Gathered(name, where, 0, len(devices), on_gpus(devices))
        gathered, kept = self._gathered, self._group
        assert gathered is not None
        for rank, ask in enumerate(asks.values(), 1):
            ask.answer.set_result(msgspec.structs.replace(gathered, rank=rank))

        def broadcast() -> None:
            group = kept if store is None else Group(gathered, device, self._advertise, store)
            if group is None or self._gathered is not gathered:
                raise RuntimeError("it was given up before its members had met")
            self._group = group
            group.broadcast(payload)

        await self._watched(broadcast)
        self._count(len(payload))
        self._holds |= dict.fromkeys(asks, version)

    def _is_the_group(self, asks: Asks) -> bool:
        """Whether those who ask, all of them and nobody else, are in the group that there is."""
        group = self._gathered
        names = {ask.request.group for ask in asks.values()}
        return group is not None and names == {group.group} and len(asks) == group.size - 1

    async def _watched(self, broadcast: Callable[[], None]) -> None:
        """Run it in a thread of its own: whatever has hung in one must not keep the next from starting."""
        done: Future[None] = Future()

        def run() -> None:
            failure = None
            try:
                broadcast()
            except BaseException as error:  # noqa: BLE001 - told to whoever waits
                failure = error
            if done.set_running_or_notify_cancel():
                done.set_exception(failure) if failure else done.set_result(None)

        threading.Thread(target=run, name="weights broadcast", daemon=True).start()
        started_s, ended = time.monotonic(), asyncio.wrap_future(done)
        try:
            while not (await asyncio.wait([ended], timeout=_POLL_S))[0]:
                moved_s = started_s if self._group is None else max(started_s, self._group.moved_s)
                if time.monotonic() - moved_s > ABANDON_S:
                    raise TimeoutError(f"nothing has moved for {ABANDON_S:.0f} s")
            ended.result()
        finally:
            ended.cancel()

    def _leave_group(self) -> None:
        if self._group is not None:
            # In a thread of its own: it waits for what it breaks off.
            threading.Thread(target=self._group.close, name="weights group ends", daemon=True).start()
        self._gathered = self._group = None


def on_gpus(devices: Sequence[str]) -> bool:
    """Whether all members compute on GPUs, no two of them on the same: NCCL wants it so."""
    return "cpu" not in devices and len(set(devices)) == len(devices)
