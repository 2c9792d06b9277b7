"""Finished groups on their way to the coordinator: as many in a message as there are when it can go."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence

from asyncrl.rollout.engines.base import EngineStats
from asyncrl.wire.messages import Submit
from asyncrl.wire.rpc import MAX_FRAMES, RpcClient, RpcRefused

LONGEST_WAIT_S = 0.025
"""A group waits for the answer to the message before its own, but no longer than this: it comes from a
host far away, perhaps, or from a coordinator that has much to do."""
MESSAGE_BYTES = 1 << 20
"""Of several groups together: what a message costs beside its bytes is then next to nothing."""

_Handed = tuple[bytes, "asyncio.Future[None]"]


class Outbox:
    """Groups that come in the same turn of the event loop go together, and so do those that come while a
    message is under way. stats: the engine's, which go along. timeout_s: to wait for an answer."""

    def __init__(self, client: RpcClient, stats: Callable[[], EngineStats], timeout_s: float) -> None:
        self._client = client
        self._stats = stats
        self._timeout_s = timeout_s
        self._waiting: deque[_Handed] = deque()
        self._next_look: asyncio.Handle | None = None
        """At those that wait."""
        self._under_way: set[asyncio.Task[None]] = set()
        self._sent_s = 0.0
        """When the last one went, by the event loop's clock."""

    async def hand_in(self, group: bytes) -> None:
        """Returns once the group is stored, or was settled before. Raises `RpcRefused` where it is not taken,
        which concerns no other group, and `RpcError` where no answer comes in time."""
        loop = asyncio.get_running_loop()
        outcome = loop.create_future()
        self._waiting.append((group, outcome))
        if self._next_look is None:
            self._next_look = loop.call_soon(self._look)
        await outcome

    def _look(self) -> None:
        """Send a message, or look again when it may go."""
        loop, self._next_look = asyncio.get_running_loop(), None
        self._waiting = deque(
            one for one in self._waiting if not one[1].done()
        )  # as who waited was cancelled
        if not self._waiting:
            return
        if not self._under_way or loop.time() >= self._sent_s + LONGEST_WAIT_S:
            self._sent_s = loop.time()
            task = loop.create_task(self._send(self._together()))
            self._under_way.add(task)
            task.add_done_callback(self._arrived)
        if self._waiting:
            self._next_look = loop.call_at(self._sent_s + LONGEST_WAIT_S, self._look)

    def _arrived(self, task: asyncio.Task[None]) -> None:
        self._under_way.discard(task)
        if self._waiting and not self._under_way:
            assert self._next_look is not None
            self._next_look.cancel()
            self._next_look = asyncio.get_running_loop().call_soon(self._look)

    def _together(self) -> Sequence[_Handed]:
        """At least one, however large."""
        together = [self._waiting.popleft()]
        n_bytes = len(together[0][0])
        while self._waiting and len(together) < MAX_FRAMES:
            n_bytes += len(self._waiting[0][0])
            if n_bytes > MESSAGE_BYTES:
                break
            together.append(self._waiting.popleft())
        return together

    async def _send(self, together: Sequence[_Handed]) -> None:
        refused: dict[int, Exception] = {}
        try:
            groups = [group for group, _ in together]
            answer, _ = await self._client.request(Submit(self._stats()), groups, timeout_s=self._timeout_s)
            refused |= {i: RpcRefused(why) for i, why in answer.refused.items()}
        except Exception as error:  # noqa: BLE001 - raised where the groups are handed in
            refused = dict.fromkeys(range(len(together)), error)
        for i, (_, outcome) in enumerate(together):
            if outcome.done():
                continue
            if i in refused:
                outcome.set_exception(refused[i])
            else:
                outcome.set_result(None)
