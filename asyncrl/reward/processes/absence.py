"""While what a reward function asks over a network is away, one of its calls asks again, and the others that
have found it away wait for what comes of that."""

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
"""Before what is away is asked again."""


class Absence:
    """Of what one function asks. patience_s: for how long a call waits for it."""

    def __init__(self, name: str, patience_s: float) -> None:
        self.name = name
        self.patience_s = patience_s
        self.probe: asyncio.Future[None] | None = None
        """Done when the call that asks again has an answer, or gives up."""

    @contextmanager
    def of_call(self, seat: Seat) -> Iterator[CallAbsence]:
        """What one call, which has a seat, has to do with it."""
        with ExitStack() as probing:
            yield CallAbsence(self, seat, probing)


class CallAbsence:
    def __init__(self, absence: Absence, seat: Seat, probing: ExitStack) -> None:
        self._absence = absence
        self._seat = seat
        self._probing = probing
        """Holds what is to be undone when this call is the one that asks again."""
        self._began_s = time.monotonic()
        self._pauses = 0
        """0 where it is not this call that asks again."""

    @property
    def has_patience(self) -> bool:
        return self._left_s > 0

    async def pause(self, reason: str) -> None:
        """It was away. Until it may be worth asking again, as long as there is patience."""
        if not self._pauses and (probe := self._absence.probe) is not None:
            async with self._seat.left():
                await asyncio.wait([probe], timeout=self._left_s)
            return
        if not self._pauses:
            self._begin()
        self._pauses += 1
        log.warning(
            "reward function `%s` cannot reach what it asks, for %.0f s (reward.patience_s=%g): %s",
            *(self._absence.name, time.monotonic() - self._began_s, self._absence.patience_s),
            reason.partition("\n")[0],
        )
        async with self._seat.left():
            await asyncio.sleep(_pause_s(self._pauses))

    @property
    def _left_s(self) -> float:
        return self._began_s + self._absence.patience_s - time.monotonic()

    def _begin(self) -> None:
        """This call asks again, for all."""
        absence = self._absence
        probe = absence.probe = asyncio.get_running_loop().create_future()

        def end() -> None:
            absence.probe = None
            probe.set_result(None)

        self._probing.callback(end)
        self._probing.enter_context(waiting(f"what the reward function {absence.name} asks", self._left_s))


def _pause_s(pauses: int) -> float:
    """Before another try, after so many: twice as long as before, and never the same for two calls, so that
    they do not all come back at once."""
    longest = min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2 ** min(pauses, 16))
    return random.uniform(longest / 2, longest)  # no matter of training: nothing is drawn from the run's seed
