"""The processes of a reward pool, and the seats in them."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager

from asyncrl.affinity import usable_cores
from asyncrl.config import RewardConfig
from asyncrl.errors import ConfigError
from asyncrl.reward.processes import wire
from asyncrl.reward.processes.child import ChildDied, RewardChild
from asyncrl.reward.processes.line import Line
from asyncrl.reward.processes.shared_child import SharedChild

KILL_TIMEOUT_S = 10.0
"""Longest wait for a process to be gone after SIGKILL."""


AUTO_MOST = 8


def auto_limit() -> int:
    """Processes that `reward.workers: auto` may become: a second one where there is hardly a core for it,
    since much of what takes long waits for something else."""
    return max(2, min(AUTO_MOST, usable_cores() // 2))


class Seat:
    """One of a limited number of seats, held in the body of `async with`."""

    def __init__(self, seats: asyncio.Semaphore) -> None:
        self._seats = seats
        self._is_held = False

    async def __aenter__(self) -> Seat:
        await self._seats.acquire()
        self._is_held = True
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._is_held:
            self._seats.release()

    @asynccontextmanager
    async def left(self) -> AsyncIterator[None]:
        """Others may have the seat while the body runs."""
        self._is_held = False
        self._seats.release()
        yield  # after an exception it is not needed again
        await self._seats.acquire()
        self._is_held = True


class Children:
    """`config.workers` processes that run one call at a time each (`line.py`), and as many for async
    functions, which run `config.concurrency` calls each; only the kinds that are needed.

    functions: what each imports. may_grow: whether `workers: auto` may become more than one.
    """

    def __init__(
        self,
        functions: Sequence[wire.Function],
        config: RewardConfig,
        start_timeout_s: float,
        *,
        may_grow: bool,
    ) -> None:
        self._functions = functions
        self._start_timeout_s = start_timeout_s
        self._workers = config.first_workers
        """Processes that are started, and that async functions have."""
        most = auto_limit() if config.workers == "auto" and may_grow else self._workers
        self._line = Line(self._spawn, most, config.timeout_s)
        self._alone = asyncio.Semaphore(self._workers)
        self._unlimited = asyncio.Semaphore(sys.maxsize)
        self._shared_seats = asyncio.Semaphore(self._workers * config.concurrency)
        self._shared: list[SharedChild] = []
        self._sharing = asyncio.Lock()
        self._all: set[RewardChild] = set()
        """All whose process may still exist."""
        self.is_async: list[bool] = []
        """Whether each function is async; known after `start`."""
        self.closed = False

    async def start(self) -> None:
        """Start the processes, which import the functions. Raises `ConfigError` if that fails, and leaves no
        process behind."""
        starting = [asyncio.create_task(self._spawn()) for _ in range(self._workers)]
        try:
            children = await asyncio.gather(*starting)
        except BaseException:
            for task in starting:
                task.cancel()
            await asyncio.gather(*starting, return_exceptions=True)
            await self.close()
            raise
        if all(self.is_async):
            self._shared += map(SharedChild, children)
        else:
            for child in children:
                self._line.add(child)

    def seat(self, *, shared: bool) -> Seat:
        """A seat for a call, or for several in a row. Plain functions' calls need none: they form a line."""
        return Seat(self._shared_seats if shared else self._unlimited)

    async def ask(self, call: wire.Call, *, shared: bool) -> wire.Reply:
        """The answer of a process, for a caller that holds a seat. Raises as `Line.ask` and
        `SharedChild.ask`; `ConfigError` or `OSError` if no process can be started."""
        if not shared:
            return await self._line.ask(call)
        request = wire.frame(call)
        return await (await self._take_shared()).ask(request, call.number, call.timeout_s)

    async def ask_alone(self, call: wire.Call) -> wire.Reply:
        """The answer of an async function that runs in a process of its own."""
        request = wire.frame(call)
        async with self._alone:
            child = await self._spawn()
            try:
                return await child.ask(request, call.number, call.timeout_s)
            finally:
                child.kill()

    async def close(self) -> None:
        """Kill every process and wait until they are gone. Calls in progress fail."""
        self.closed = True
        self._line.close()
        await end(self._all)

    async def _take_shared(self) -> SharedChild:
        """The one with the fewest calls."""
        async with self._sharing:
            self._shared = [child for child in self._shared if child.alive]
            if len(self._shared) < self._workers:
                self._shared.append(SharedChild(await self._spawn()))
        return min(self._shared, key=lambda child: child.calls)

    async def _spawn(self) -> RewardChild:
        """A process that is ready. Raises `ConfigError`, or `OSError` if the system cannot start one."""
        if self.closed:
            raise ChildDied("the pool was closed")
        child = RewardChild()
        self._all.add(child)
        child.exited.add_done_callback(lambda _: self._all.discard(child))
        specs = [function.spec for function in self._functions]
        try:
            reply = await child.start(wire.Setup(list(self._functions)), self._start_timeout_s)
        except TimeoutError:
            raise ConfigError(
                f"reward functions {', '.join(specs)}: not imported after {self._start_timeout_s:g} s; "
                f"do less at import time"
            ) from None
        except ChildDied as death:
            raise ConfigError(
                f"reward functions {', '.join(specs)}: the process died ({death}) while importing them; "
                f"its last output is in the log above"
            ) from None
        if isinstance(reply, wire.SetupFailed):
            child.kill()
            raise ConfigError(reply.message)
        assert isinstance(reply, wire.Ready)
        self.is_async = reply.is_async
        return child


async def end(children: Iterable[RewardChild]) -> None:
    """Kill processes and wait until they are gone. Raises `RuntimeError` when they do not go."""
    ending = list(children)
    for child in ending:
        child.kill()
    if ending:
        _, left = await asyncio.wait([child.exited for child in ending], timeout=KILL_TIMEOUT_S)
        if left:
            raise RuntimeError(f"{len(left)} reward processes still exist {KILL_TIMEOUT_S:g} s after SIGKILL")
