"""Calls of plain functions, first come first served by processes that run one call at a time each."""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import msgspec

from asyncrl.reward.processes import wire
from asyncrl.reward.processes.child import ChildDied, RewardChild

log = logging.getLogger(__name__)

AHEAD_S = 0.02
"""So much work waits in a process itself, by the pace of late: it then needs no turn of this loop between one
call and the next, which may take as long as a step of the engine."""
MOST_AHEAD = 64
"""Calls."""
LATE_S = 0.1
"""A call that takes longer holds up none that was sent after it: these go back to the line."""
UNWANTED_S = 1.0
"""So long may one take that was cancelled when it had begun and nobody knew; then its process is killed."""
GROW_S = 0.25
"""A call that has waited for so long is worth another process, where there may be one."""
FADING = 0.8
"""What the pace so far counts in the next, where the latest call has the rest."""


@dataclass(slots=True, eq=False)
class _Asked:
    call: wire.Call
    request: bytes
    """The call, framed."""
    asked_s: float
    reply: asyncio.Future[wire.Reply]


class _Server:
    """A process with the calls that it has been sent. It answers all of them in their order, so which one it
    is at is known.

    give_back: takes calls, in their order, that it will not carry out. timeout_s: of a call, from its start.
    """

    def __init__(
        self, child: RewardChild, timeout_s: float, give_back: Callable[[list[_Asked]], None]
    ) -> None:
        self.child = child
        self.sent: deque[_Asked | None] = deque()
        """None for a call that was given back or cancelled: it is skipped, and still answered."""
        self.is_late = False
        """The call that it is at takes long: nothing is sent after it."""
        self._was_killed = False
        """For one call: what it was at when it died may be another."""
        self._timeout_s = timeout_s
        self._give_back = give_back
        self._timer: asyncio.TimerHandle | None = None
        child.on_reply = self._answered
        child.on_death = self._died

    def send(self, asked: _Asked) -> None:
        self.sent.append(asked)
        self.child.tell(asked.request)
        if len(self.sent) == 1:
            self._at_next()

    def drop(self, asked: _Asked) -> None:
        """Nobody wants the answer any more."""
        if asked is self.sent[0]:
            self._kill()
        else:
            self.child.tell(wire.frame(wire.Cancel(asked.call.number)))
            self.sent[self.sent.index(asked)] = None

    def _at_next(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self.is_late, self._timer = False, None
        if self.sent:
            limit_s = min(LATE_S, self._timeout_s)
            self._timer = asyncio.get_running_loop().call_later(limit_s, self._takes_long)

    def _takes_long(self) -> None:
        self.is_late = True
        limit_s = self._timeout_s if self.sent[0] is not None else min(UNWANTED_S, self._timeout_s)
        left_s = max(0.0, limit_s - LATE_S)
        self._timer = asyncio.get_running_loop().call_later(left_s, self._timed_out)
        behind = self._behind()
        for asked in behind:
            self.drop(asked)
        self._give_back(behind)

    def _timed_out(self) -> None:
        _settle(self.sent[0], TimeoutError())
        self._kill()

    def _kill(self) -> None:
        self._was_killed = True
        self.child.kill()

    def _answered(self, reply: wire.Reply) -> None:
        _settle(self.sent.popleft(), reply)
        self._at_next()

    def _died(self, death: ChildDied) -> None:
        left = self._behind()
        if self.sent and self._was_killed:
            left = [asked for asked in self.sent if asked is not None]
        elif self.sent:
            _settle(self.sent[0], death)
        self.sent.clear()
        self._at_next()
        self._give_back(left)

    def _behind(self) -> list[_Asked]:
        return [asked for asked in list(self.sent)[1:] if asked is not None]


class Line:
    """The calls, and the processes that take them.

    A process is sent more than it is at, as much as it will have done in `AHEAD_S`. What was sent after a
    call that kills its process, or takes long, goes back to the head of the line: only that call is
    concerned.

    spawn: starts a process. most: processes; another one is started only when a call has waited for `GROW_S`,
    or none is left.
    """

    def __init__(self, spawn: Callable[[], Awaitable[RewardChild]], most: int, timeout_s: float) -> None:
        self._spawn = spawn
        self._most = most
        self._timeout_s = timeout_s
        self._waiting: deque[_Asked] = deque()
        self._numbers = itertools.count(1)
        self._servers: list[_Server] = []
        self._starting: set[asyncio.Task[None]] = set()
        self._pace_s: dict[int, float] = {}
        """Seconds of a call, by function."""
        self._timer: asyncio.TimerHandle | None = None
        self._is_closed = False

    def add(self, child: RewardChild) -> None:
        """A process that is ready."""
        self._servers.append(_Server(child, self._timeout_s, self._back))
        self._move()

    async def ask(self, call: wire.Call) -> wire.Result | wire.Raised:
        """The answer to a call, whose number is given here. Raises `TimeoutError` or `ChildDied` when it took
        too long or its process has died of it, `ConfigError` or `OSError` if no process can be started, and
        as `wire.frame`. When it is cancelled at work, its process is killed."""
        call = self._numbered(call)
        reply_to: asyncio.Future[wire.Reply] = asyncio.get_running_loop().create_future()
        asked = _Asked(call, wire.frame(call), time.monotonic(), reply_to)
        self._waiting.append(asked)
        self._move()
        try:
            reply = await asked.reply
        except asyncio.CancelledError:
            for server in self._servers:
                if asked in server.sent and server.child.alive:
                    server.drop(asked)
            raise
        finally:
            self._move()
        assert isinstance(reply, wire.Result | wire.Raised)
        before_s = self._pace_s.get(call.function, reply.took_s)
        self._pace_s[call.function] = FADING * before_s + (1 - FADING) * reply.took_s
        return reply

    def close(self) -> None:
        """Fail what waits. The processes are others' to kill."""
        self._is_closed = True
        self._move()

    def _numbered(self, call: wire.Call) -> wire.Call:
        return msgspec.structs.replace(call, number=next(self._numbers))

    def _back(self, calls: list[_Asked]) -> None:
        """Under new numbers: what is still said of the old ones does not concern them."""
        for asked in reversed(calls):
            asked.call = self._numbered(asked.call)
            asked.request = wire.frame(asked.call)
            self._waiting.appendleft(asked)
        asyncio.get_running_loop().call_soon(self._move)

    def _move(self) -> None:
        """Send what there is room for; see to more processes where they are due."""
        self._servers = [server for server in self._servers if server.child.alive]
        while self._waiting:
            asked = self._waiting[0]
            if self._is_closed:
                _settle(asked, ChildDied("the pool was closed"))
            if not asked.reply.done():
                server = min(self._servers, key=lambda one: self._work_s(one), default=None)
                if server is None or not self._has_room(server, asked):
                    break
                server.send(asked)
            self._waiting.popleft()
        self._grow()

    def _work_s(self, server: _Server) -> float:
        """What it has been sent, by the pace of late; what is unknown may take long."""
        if server.is_late:
            return float("inf")
        return sum(self._expected_s(asked) for asked in server.sent if asked is not None)

    def _expected_s(self, asked: _Asked) -> float:
        return self._pace_s.get(asked.call.function, AHEAD_S)

    def _has_room(self, server: _Server, asked: _Asked) -> bool:
        if not server.sent:
            return True
        work_s = self._work_s(server) + self._expected_s(asked)
        return work_s <= AHEAD_S and len(server.sent) < MOST_AHEAD

    def _grow(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if not self._waiting or self._starting or len(self._servers) >= self._most:
            return
        loop = asyncio.get_running_loop()
        left_s = self._waiting[0].asked_s + GROW_S - time.monotonic() if self._servers else 0.0
        if left_s > 0:
            self._timer = loop.call_later(left_s, self._grow)
            return
        task = loop.create_task(self._start())
        self._starting.add(task)
        task.add_done_callback(self._starting.discard)

    async def _start(self) -> None:
        """Another process. Where none can be started, that is a failure of the call that was next."""
        try:
            child = await self._spawn()
        except Exception as error:  # noqa: BLE001 - the call is told, or would wait for ever
            if self._servers:
                log.warning("the reward functions stay in %d processes: %s", len(self._servers), error)
                self._most = len(self._servers)
            elif self._waiting:
                _settle(self._waiting[0], error)
        else:
            self.add(child)
        finally:
            asyncio.get_running_loop().call_soon(self._move)


def _settle(asked: _Asked | None, outcome: wire.Reply | Exception) -> None:
    if asked is None or asked.reply.done():  # its caller was cancelled
        return
    if isinstance(outcome, Exception):
        asked.reply.set_exception(outcome)
    else:
        asked.reply.set_result(outcome)
