"""Measures where the wall-clock time of a loop goes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from asyncrl.config import Config
from asyncrl.core.records import Batch
from asyncrl.observe.mfu import Trainer, Utilisation
from asyncrl.observe.role_meter import RoleMeter
from asyncrl.roles import RANK_0
from asyncrl.states import CLOCK, State, doing
from asyncrl.trace import ended

OTHER = "other"
"""The phase outside all named phases."""
PHASES: Mapping[str, State] = {
    "wait": "wait_data",
    "train": "forward_backward",
    "publish": "publish",
    "checkpoint": "checkpoint",
    OTHER: "other",
}
"""Of a training step's wall clock, which they add up to; and the trainer's state in each."""


@dataclass(frozen=True, slots=True)
class TimeSpent:
    """How a stretch of wall-clock time divides into phases. Whole nanoseconds, so that they add up
    exactly."""

    phases_ns: dict[str, int]

    @property
    def total_s(self) -> float:
        return sum(self.phases_ns.values()) / 1e9

    def seconds(self, phase: str) -> float:
        """Seconds in a phase; 0 if it did not occur."""
        return self.phases_ns.get(phase, 0) / 1e9

    def share(self, phase: str) -> float:
        """Share of the time, in [0, 1]; 0 if no time has passed."""
        return self.phases_ns.get(phase, 0) / (sum(self.phases_ns.values()) or 1)


class TimeShares:
    """Attributes every moment of a loop to exactly one phase, so that the shares add up to the wall clock.

    A phase inside another interrupts it. For one thread (or one task, if no other enters phases); the clock
    starts at construction. now_ns: returns nanoseconds.

        clock = TimeShares()
        for ...:
            with clock.phase("wait"):
                ...
            spent = clock.lap()  # since the last lap
    """

    def __init__(self, now_ns: Callable[[], int] = time.perf_counter_ns) -> None:
        self._now_ns = now_ns
        self._phase = OTHER
        self._since_ns = now_ns()
        self._phases_ns: dict[str, int] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Attribute the body's time to `name`, even if it raises."""
        outer = self._switch(name)
        try:
            yield
        finally:
            self._switch(outer)

    def lap(self) -> TimeSpent:
        """The time since the last lap; may be called inside a phase."""
        self._switch(self._phase)
        spent, self._phases_ns = self._phases_ns, {}
        return TimeSpent(spent)

    def _switch(self, name: str) -> str:
        """Book the time since the last switch, enter the phase `name`, and return the phase that ended."""
        now_ns, ended = self._now_ns(), self._phase
        self._phases_ns[ended] = self._phases_ns.get(ended, 0) + now_ns - self._since_ns
        self._since_ns, self._phase = now_ns, name
        return ended


class StepClock(TimeShares):
    """Of the trainer's steps, whose `PHASES` are states of its role, too."""

    def __init__(self, config: Config, trainer: Trainer) -> None:
        super().__init__()
        self._utilisation = Utilisation.of(config, trainer)
        self._states, self._role = RoleMeter(), RANK_0
        if config.run.in_one_process:  # which other roles' processes do when they start
            self._role = config.run.mode
            CLOCK.begin()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        with super().phase(name), doing(PHASES[name]):
            yield

    def metrics(self, batch: Batch, metrics: Mapping[str, float]) -> dict[str, float]:
        """Of a step, which the time since the last lap was. metrics: its others."""
        spent, trained_tokens = self.lap(), metrics["trained_tokens"]
        ended("step", f"step {batch.step + 1}", spent.total_s)
        used = self._states.states(self._role, 0, CLOCK.seconds())
        if self._utilisation is not None:
            lengths = [len(t.token_ids) for group in batch.groups for t in group.trajectories]
            generated_per_s = metrics["throughput/generated_tokens_per_s"]
            used |= self._utilisation.metrics(lengths, spent.total_s, generated_per_s)
        return {
            **{f"time/{phase}_s": spent.seconds(phase) for phase in PHASES},
            "time/step_s": spent.total_s,
            "idle/trainer": spent.share("wait"),
            "throughput/trained_tokens_per_s": trained_tokens / spent.total_s if spent.total_s else 0.0,
            **used,
        }
