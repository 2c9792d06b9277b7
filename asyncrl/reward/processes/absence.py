"""While the service that a reward function calls over a network is unavailable, one call probes it, and the
other calls that have met the outage wait for the outcome."""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from asyncrl.reward.processes.children import Seat
from asyncrl.waits import waiting

log = logging.getLogger(__name__)

FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.5, 15.0
"""Pauses before the service is tried again."""


class Absence:
    """Of the service of one function. patience_s: how long a call waits for it."""

    def __init__(self, name: str, patience_s: float) -> None:
        self.name = name
        self.patience_s = patience_s
        self.probe: asyncio.Future[None] | None = None
        """Done when the call that probes has an answer or gives up."""

    @contextmanager
    def of_call(self, seat: Seat) -> Iterator[CallAbsence]:
        """The absence as one call sees it that holds a seat."""
        with ExitStack() as probing:
            yield CallAbsence(self, seat, probing)


class CallAbsence:
    def __init__(self, absence: Absence, seat: Seat, probing: ExitStack) -> None:
        self._absence = absence
        self._seat = seat
        self._probing = probing
        """Undoes what this call has set up if it is the one that probes."""
        self._began_s = time.monotonic()
        self._pauses = 0
        """0 unless this call probes."""

    @property
    def has_patience(self) -> bool:
        return self._left_s > 0

    async def pause(self, reason: str, retry_after_s: float = 0.0) -> None:
        """The service was unavailable: wait until it is worth another try, or patience runs out.
        retry_after_s: what the service asks to wait."""
        if not self._pauses and (probe := self._absence.probe) is not None:
            async with self._seat.left():
                await asyncio.wait([probe], timeout=self._left_s)
            return
        if not self._pauses:
            self._begin()
        self._pauses += 1
        log.warning(
            "reward function `%s` has not reached its service for %.0f s (reward.patience_s=%g): %s",
            *(self._absence.name, time.monotonic() - self._began_s, self._absence.patience_s),
            reason.partition("\n")[0],
        )
        async with self._seat.left():
            await asyncio.sleep(max(_pause_s(self._pauses), min(retry_after_s, self._left_s)))

    @property
    def _left_s(self) -> float:
        return self._began_s + self._absence.patience_s - time.monotonic()

    def _begin(self) -> None:
        """This call probes for all."""
        absence = self._absence
        probe = absence.probe = asyncio.get_running_loop().create_future()

        def end() -> None:
            absence.probe = None
            probe.set_result(None)

        self._probing.callback(end)
        self._probing.enter_context(
            waiting(f"the service of the reward function {absence.name}", self._left_s)
        )


def _pause_s(pauses: int) -> float:
    """Seconds before the next try: doubled each time, and random, so that calls do not all return at once."""
    longest = min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2 ** min(pauses, 16))
    return random.uniform(longest / 2, longest)  # does not affect training, so not from the run's seed
