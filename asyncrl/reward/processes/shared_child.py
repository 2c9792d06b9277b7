"""The parent's side of a reward process that runs calls of async functions side by side."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable

from asyncrl.reward.processes import wire
from asyncrl.reward.processes.child import Child, ChildDied

log = logging.getLogger(__name__)

CANCEL_S = 5.0
"""Longest wait for a cancelled call to end."""
LOOK_S = 0.05


class Interrupted(ChildDied):
    """The process was killed because of another call, or its machine is gone."""


class SharedChild:
    """Each call has its own time limit, and the others continue when it ends. Time in which a call blocks the
    event loop counts against that call only. If a call cannot be stopped otherwise, the process is killed:
    the other calls get `Interrupted` if it is known which call it was, else all get `ChildDied`.

    on_asks: gets what calls ask for. away_s: seconds for which a call has waited for that, which do not count
    against it either."""

    def __init__(
        self,
        child: Child,
        *,
        on_asks: Callable[[wire.Asks], None] = lambda _: None,
        away_s: Callable[[int], float] = lambda _: 0.0,
    ) -> None:
        self._child = child
        self._on_asks = on_asks
        self._away_s = away_s
        child.on_notice = self._noticed
        self.calls = 0
        """In progress."""
        self._stuck: wire.Stuck | None = None
        self._stuck_since_s = 0.0
        self._blocked_s = 0.0
        """Total time in which calls have blocked the event loop."""
        self._own_s: dict[int, float] = {}
        """The same for each call in progress."""

    @property
    def alive(self) -> bool:
        return self._child.alive

    def tell(self, message: bytes) -> None:
        """Send a message that has no answer of its own."""
        self._child.tell(message)

    def kill(self) -> None:
        self._child.kill()

    async def ask(self, request: bytes, number: int, timeout_s: float) -> wire.Reply:
        """Send a framed request and return the answer. Raises `TimeoutError` when the call has had
        `timeout_s` seconds, with where it blocks the event loop if it does, or `ChildDied`; in both cases,
        and when cancelled, the call is cancelled."""
        self.calls += 1
        self._own_s[number] = 0.0
        try:
            reply = self._child.post(request, number)
            if await self._comes(reply, number, timeout_s, excuse_s=timeout_s):
                return reply.result()
            blocks = self._blocks(number)
            await self._give_up(reply, number, timeout_s)
            raise TimeoutError(blocks or self._blocks(number))  # it may have begun shortly before
        except asyncio.CancelledError:
            if self.alive:
                self._child.tell(wire.frame(wire.Cancel(number)))
            raise
        finally:
            self.calls -= 1
            del self._own_s[number]
            self._child.forget(number)

    def _blocks(self, number: int) -> str:
        """Where a call blocks the event loop, if it is known to."""
        return self._stuck.where if self._stuck is not None and self._stuck.number == number else ""

    async def _give_up(self, reply: asyncio.Future[wire.Reply], number: int, timeout_s: float) -> None:
        """End a call that has used up its time. Raises `ChildDied` if the whole process must be killed and it
        is unknown which call is to blame."""
        if self._stuck is None or self._stuck.number != number:
            self._child.tell(wire.frame(wire.Cancel(number)))
            if await self._comes(reply, number, CANCEL_S, excuse_s=timeout_s):
                return
        self._child.forget(number)
        if self._stuck is not None and self._stuck.number == number:
            why = f"another call blocked it for more than {timeout_s:g} s ({self._stuck.where})"
            self._child.fail(Interrupted(f"its process was killed because {why}"))
            self._child.kill()
            return
        deaf = ChildDied(f"killed because its event loop did not cancel a call within {CANCEL_S:g} s")
        self._child.fail(deaf)
        self._child.kill()
        raise deaf

    async def _comes(
        self, reply: asyncio.Future[wire.Reply], number: int, limit_s: float, *, excuse_s: float
    ) -> bool:
        """Whether an answer arrives before the call has had `limit_s`. Its clock stops while another call
        blocks the loop, for at most `excuse_s` at a time: by then that call's own time is up."""
        began_s, lost_before_s = time.monotonic(), self._lost_s(number, excuse_s)
        while not reply.done():
            lost_s = self._lost_s(number, excuse_s) - lost_before_s
            left_s = began_s + limit_s + lost_s - time.monotonic()
            if left_s <= 0:
                return False
            await asyncio.wait([reply], timeout=max(left_s, LOOK_S))
        return True

    def _lost_s(self, number: int, excuse_s: float) -> float:
        """Seconds for which other calls have blocked the loop."""
        now_s = 0.0
        if self._stuck is not None and self._stuck.number != number:
            now_s = min(time.monotonic() - self._stuck_since_s, excuse_s)
        return self._blocked_s - self._own_s.get(number, 0.0) + now_s + self._away_s(number)

    def _noticed(self, notice: wire.Notice) -> None:
        if isinstance(notice, wire.Asks):
            self._on_asks(notice)
            return
        if isinstance(notice, wire.Stuck):
            self._stuck, self._stuck_since_s = notice, time.monotonic() - notice.for_s
            if self.calls > 1:
                log.warning(
                    "%s blocks the event loop of its process, and %d other groups are waiting: `await` slow "
                    "work, or run it with `await asyncio.to_thread(...)`",
                    *(notice.where, self.calls - 1),
                )
            return
        self._stuck = None
        self._blocked_s += notice.blocked_s
        if notice.number in self._own_s:
            self._own_s[notice.number] += notice.blocked_s
