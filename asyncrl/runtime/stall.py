"""Notices that a run does not get on, says who waits for whom, and finds who holds it up."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

from asyncrl.config import RunConfig
from asyncrl.core.coordinator import Coordinator
from asyncrl.core.ledger import GroupState
from asyncrl.errors import RunFailed
from asyncrl.runtime.layout import TRAINER
from asyncrl.runtime.pulse import Stall, describe_waits, read_pulses

MAX_GROUPS = 10
"""Named in an explanation."""


class Worker(Protocol):
    """What the coordinator knows of a rollout worker."""

    engine_version: int | None
    last_heard_s: float


class StallWatch:
    """Is told of everything that is progress.

    roles: all of the run's. pulses: the folder of their pulses. now_s: a monotonic clock.
    """

    def __init__(
        self,
        run: RunConfig,
        coordinator: Coordinator[Any],
        workers: Mapping[str, Worker],
        roles: Collection[str],
        pulses: Path,
        now_s: Callable[[], float] = time.monotonic,
    ) -> None:
        self._run = run
        self._coordinator = coordinator
        self._workers = workers
        self._roles = roles
        self._pulses = pulses
        self._now_s = now_s
        self._started = coordinator.frontier > 0
        """An engine has taken the first weights: from here on steps are due."""
        self._since_s = self._step_s = self._taken_s = self._begun_s = self._complete_s = now_s()
        self._leased_s: dict[int, float] = {}
        self.has_weights = False
        """There are weights that an engine could take."""
        self.behind: tuple[str, ...] = ()
        """The workers that the trainer waits for before it can publish."""

    def started(self) -> None:
        """An engine samples."""
        if not self._started:
            self._started = True
            self.stepped()

    def stepped(self) -> None:
        """A step has ended."""
        self._since_s = self._step_s = self._now_s()

    def joined(self) -> None:
        """A role has come back: `run.stall_s` begin anew."""
        self._since_s = self._now_s()

    def taken(self) -> None:
        """The trainer has got a batch."""
        self._taken_s = self._now_s()

    def leased(self, group_ids: Iterable[int]) -> None:
        self._leased_s |= dict.fromkeys(group_ids, self._now_s())

    def handed_in(self, group_id: int) -> None:
        self._leased_s.pop(group_id, None)

    def look(self) -> Stall | None:
        """A stall that is new, if there is one. Raises `RunFailed` when the run has not started in time."""
        now_s, run = self._now_s(), self._run
        if not self._started and now_s - self._begun_s > run.start_s:
            raise RunFailed(f"the run has not started after run.start_s={run.start_s:g}. {self._explain()}")
        if not self._started or self._coordinator.finished:
            return None
        if self._starting():
            self._complete_s = now_s
            if now_s - self._since_s <= max(run.start_s, run.stall_s):
                return None
        elif now_s - max(self._since_s, self._complete_s) <= run.stall_s:
            return None
        silent_s = now_s - self._step_s
        return self.stall(f"no training step has ended for {silent_s:.0f} s (run.stall_s={run.stall_s:g})")

    def stall(self, what: str) -> Stall:
        """There is one. The next comes when `run.stall_s` have passed once more."""
        self._since_s = self._now_s()
        return Stall(f"{what}. {self._explain()}", self._culprits(), self._coordinator.version)

    def _starting(self) -> tuple[str, ...]:
        """The roles that have not come (back) yet: it may be one of them that all wait for."""
        up = read_pulses(self._pulses).keys()
        return tuple(role for role in self._roles if role not in up)

    def _culprits(self) -> tuple[str, ...]:
        if self._starting():
            return ()  # the supervisor replaces what does not come up
        if self.behind:
            return self.behind
        if self._trainer_has_a_batch or not self.has_weights:
            return (TRAINER,)
        leased = [e for e in self._coordinator.waits_for() if e.state is GroupState.LEASED]
        if leased:
            return (min(leased, key=lambda e: self._leased_s.get(e.group_id, self._begun_s)).worker,)
        # Nobody has what the step waits for: no more is admitted for whoever is not there, or samples with
        # old weights.
        now_s = self._now_s()
        silent = [n for n, w in self._workers.items() if now_s - w.last_heard_s > self._run.stall_s / 2]
        return tuple(silent or [n for n, w in self._workers.items() if self._is_behind(w)])

    def _is_behind(self, worker: Worker) -> bool:
        return worker.engine_version is None or worker.engine_version < self._coordinator.version

    @property
    def _trainer_has_a_batch(self) -> bool:
        return self._coordinator.steps_taken > self._coordinator.version

    def _explain(self) -> str:
        """Who waits for whom, for what, since when."""
        now_s, version = self._now_s(), self._coordinator.version
        if self._trainer_has_a_batch:
            trainer = f"has had the batch of step {version} for {now_s - self._taken_s:.0f} s"
        elif not self.has_weights:
            trainer = "has not published any weights since its start"
        else:
            trainer = f"has waited for the batch of step {version} for {now_s - self._step_s:.0f} s"
        lines = [f"The trainer {trainer}."]
        for entry in self._coordinator.waits_for()[:MAX_GROUPS]:
            since_s = now_s - self._leased_s.get(entry.group_id, self._begun_s)
            before = f" (attempt {entry.attempt + 1}; last: {entry.reason})" if entry.reason else ""
            is_leased = entry.state is GroupState.LEASED
            state = f"leased to {entry.worker} for {since_s:.0f} s" if is_leased else "waiting for a worker"
            lines.append(f"Group {entry.group_id} is {state}{before}.")
        for name, worker in self._workers.items():
            has = "no weights yet" if worker.engine_version is None else f"version {worker.engine_version}"
            lines.append(f"{name} has {has} and was heard {now_s - worker.last_heard_s:.0f} s ago.")
        if not self._workers:
            lines.append("No rollout worker is connected.")
        lines += [f"{role} has not come up since its start." for role in self._starting()]
        lines += describe_waits(read_pulses(self._pulses), time.time())
        ledger = self._coordinator.ledger
        if ledger.dropped_groups:
            lines.append(f"Groups dropped so far: {dict(ledger.dropped_groups)}.")
        lines += [f"The latest failed attempt: {detail}" for detail in list(ledger.failures.values())[-1:]]
        return " ".join(lines)
