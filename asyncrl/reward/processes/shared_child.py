"""A reward process that runs the calls of async functions side by side, as its parent sees it."""

from __future__ import annotations

import asyncio
import logging
import time

from asyncrl.reward.processes import wire
from asyncrl.reward.processes.child import ChildDied, RewardChild

log = logging.getLogger(__name__)

CANCEL_S = 5.0
"""For a call to end that was given up."""
LOOK_S = 0.05


class Interrupted(ChildDied):
    """The process was ended for the sake of another call."""


class SharedChild:
    """Each call has its own time limit and its own end; the others go on. Time in which one blocks the event
    loop is counted against that one only. One that cannot be stopped otherwise takes the process with it: the
    others are `Interrupted` where it is known which it was, else each gets `ChildDied`."""

    def __init__(self, child: RewardChild) -> None:
        self._child = child
        child.on_notice = self._noticed
        self.calls = 0
        """Under way."""
        self._stuck: wire.Stuck | None = None
        self._stuck_since_s = 0.0
        self._blocked_s = 0.0
        """So far, by all calls."""
        self._own_s: dict[int, float] = {}
        """The same by each call under way."""

    @property
    def alive(self) -> bool:
        return self._child.alive

    async def ask(self, request: bytes, number: int, timeout_s: float) -> wire.Reply:
        """Send a framed request; the answer. Raises `TimeoutError` when the call has had `timeout_s` seconds,
        or `ChildDied`; then, and when cancelled, the call is given up."""
        self.calls += 1
        self._own_s[number] = 0.0
        try:
            reply = self._child.post(request, number)
            if await self._comes(reply, number, timeout_s, excuse_s=timeout_s):
                return reply.result()
            await self._give_up(reply, number, timeout_s)
            raise TimeoutError
        except asyncio.CancelledError:
            if self.alive:
                self._child.tell(wire.frame(wire.Cancel(number)))
            raise
        finally:
            self.calls -= 1
            del self._own_s[number]
            self._child.forget(number)

    async def _give_up(self, reply: asyncio.Future[wire.Reply], number: int, timeout_s: float) -> None:
        """End a call whose time is over. Raises `ChildDied` where it has to be for all, and nobody knows
        whose fault it is."""
        if self._stuck is None or self._stuck.number != number:
            self._child.tell(wire.frame(wire.Cancel(number)))
            if await self._comes(reply, number, CANCEL_S, excuse_s=timeout_s):
                return
        self._child.forget(number)
        if self._stuck is not None and self._stuck.number == number:
            where = f"a call that blocked it for more than {timeout_s:g} s ({self._stuck.where})"
            self._child.fail(Interrupted(f"its process was killed for {where}"))
            self._child.kill()
            return
        deaf = ChildDied(f"its event loop did not give up a call within {CANCEL_S:g} s and was killed")
        self._child.fail(deaf)
        self._child.kill()
        raise deaf

    async def _comes(
        self, reply: asyncio.Future[wire.Reply], number: int, limit_s: float, *, excuse_s: float
    ) -> bool:
        """Whether there is an answer before the call has had `limit_s`; its time stands still while another
        call blocks the loop, for `excuse_s` at a time at most: then that one's own time is over."""
        began_s, lost_before_s = time.monotonic(), self._lost_s(number, excuse_s)
        while not reply.done():
            lost_s = self._lost_s(number, excuse_s) - lost_before_s
            left_s = began_s + limit_s + lost_s - time.monotonic()
            if left_s <= 0:
                return False
            await asyncio.wait([reply], timeout=max(left_s, LOOK_S))
        return True

    def _lost_s(self, number: int, excuse_s: float) -> float:
        """Seconds in which other calls have blocked the loop."""
        now_s = 0.0
        if self._stuck is not None and self._stuck.number != number:
            now_s = min(time.monotonic() - self._stuck_since_s, excuse_s)
        return self._blocked_s - self._own_s.get(number, 0.0) + now_s

    def _noticed(self, notice: wire.Notice) -> None:
        if isinstance(notice, wire.Stuck):
            self._stuck, self._stuck_since_s = notice, time.monotonic() - notice.for_s
            log.warning(
                "%s blocks the event loop of its process, and %d other groups wait for that: `await` what "
                "takes long, or give it to `await asyncio.to_thread(...)`",
                *(notice.where, max(0, self.calls - 1)),
            )
            return
        self._stuck = None
        self._blocked_s += notice.blocked_s
        if notice.number in self._own_s:
            self._own_s[notice.number] += notice.blocked_s
