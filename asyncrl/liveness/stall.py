"""Detects that a run makes no progress, explains who waits for whom, and finds the culprits."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, Protocol

import msgspec

from asyncrl.config import STEP_STALLS, RunConfig
from asyncrl.core.coordinator import Coordinator
from asyncrl.core.ledger import GroupState
from asyncrl.core.records import GroupSummary
from asyncrl.errors import RunFailed
from asyncrl.liveness.drops import Drops
from asyncrl.liveness.pulse import Pulse, Stall, describe_waits, patience
from asyncrl.roles import EVALUATION, RANK_0, REWARD, TRAINER, Role
from asyncrl.work import Work

MAX_GROUPS = 10
"""Longest list of groups in an explanation."""


class Worker(Protocol):
    """What the coordinator knows about a rollout worker."""

    engine_version: int | None
    last_heard_s: float
    generated_s: float
    """When its count of generated tokens last increased."""


class StallWatch:
    """Is told about steps and what they need, and observes the progress within a step.

    A step progresses while what it needs next does: once the trainer has its batch, micro-batches; before
    that, groups that are submitted, tokens from the engines that have leased what the batch waits for, and
    scores of the reward models; after the last step, what the trainer must still write. No progress for
    `run.stall_s` is a stall. So is a step that has taken `run.longest_step_s`, whatever progresses. While a
    worker waits for an unavailable reward service (`reward.patience_s`), these clocks stop. Groups that are
    submitted and dropped count as progress, but if nothing else arrives for `run.stall_s`, the run ends:
    restarting a process would not help.

    roles: all roles that steps need. pulses: returns the latest pulse of each role that has one. now_s: a
    monotonic clock.
    """

    def __init__(
        self,
        run: RunConfig,
        coordinator: Coordinator[Any],
        workers: Mapping[str, Worker],
        roles: Collection[str],
        pulses: Callable[[], Mapping[str, Pulse]],
        now_s: Callable[[], float] = time.monotonic,
    ) -> None:
        self._run = run
        self._coordinator = coordinator
        self._workers = workers
        self._roles = roles
        self._pulses = lambda: {r: p for r, p in pulses().items() if Role.parse(r).kind != EVALUATION}
        self._now_s = now_s
        self._started = coordinator.frontier > 0
        """An engine has the first weights: from now on steps are expected."""
        self._since_s = self._step_s = self._taken_s = self._begun_s = self._complete_s = now_s()
        self._all_there_s = now_s()
        """When all roles were last seen to be up."""
        self._moved_s = self._since_s
        self._work: dict[str, Work | None] = {}
        """Progress of roles that count it, at the last look."""
        self._leased_s: dict[int, float] = {}
        self._patient_s = self._since_s
        """When a worker was last seen to wait for an unavailable service."""
        self._drops = Drops()
        self._stale_before = self._stale
        """The number when the last step ended."""
        self.has_weights = False
        """Whether there are weights that an engine could load."""
        self.behind: tuple[str, ...] = ()
        """The workers that the trainer must wait for before it can publish, or take its turn."""
        self.sleeps: Callable[[str], bool] = lambda role: False
        """Whether a role need not be up now: its memory is others'."""

    def started(self) -> None:
        """An engine samples."""
        if not self._started:
            self._started = True
            self.stepped()

    def stepped(self) -> None:
        """A step has ended."""
        self._since_s = self._step_s = self._now_s()
        self._stale_before = self._stale

    def joined(self) -> None:
        """A role has come back: `run.stall_s` starts again."""
        self._since_s = self._now_s()

    def taken(self) -> None:
        """The trainer has received a batch."""
        self._taken_s = self._now_s()

    def leased(self, group_ids: Iterable[int]) -> None:
        self._leased_s |= dict.fromkeys(group_ids, self._now_s())

    def delivered(self, group_id: int, summary: GroupSummary, *, kept: bool) -> None:
        """A worker has submitted a finished group, which was kept or dropped at once."""
        if kept:
            self._drops = Drops()
        else:
            self._drops.add(summary, self._now_s())
        if self._leased_s.pop(group_id, None) is not None and not self._is_the_trainer_s_turn:
            self._moved_s = self._now_s()

    def failed(self, group_id: int) -> None:
        """An attempt has failed, which is no progress."""
        self._leased_s.pop(group_id, None)

    def look(self) -> Stall | None:
        """A new stall, if there is one. Raises `RunFailed` if the run has not started in time."""
        now_s, run = self._now_s(), self._run
        if not self._started and now_s - self._begun_s > run.start_s:
            raise RunFailed(f"the run has not started after run.start_s={run.start_s:g}. {self._explain()}")
        if not self._started:
            return None
        pulses, limit = self._pulses(), f"run.stall_s={run.stall_s:g}"
        self._look_at_work(pulses)
        if not self._is_the_trainer_s_turn and any(
            patience(pulse, time.time()) is not None for pulse in pulses.values()
        ):
            self._patient_s = now_s
        begun_s = max(self._since_s, self._complete_s, self._patient_s)
        only_drops = not self._is_the_trainer_s_turn and self._drops.lasted_s(now_s) > run.stall_s
        if only_drops and now_s - begun_s > run.stall_s:
            return self._stall_of_step(limit)
        if self._starting(pulses):
            self._complete_s = now_s
            if now_s - max(self._since_s, self._all_there_s) <= max(run.start_s, run.stall_s):
                return None
        else:
            self._all_there_s = now_s
            if now_s - max(begun_s, self._moved_s) <= run.stall_s:
                if now_s - begun_s <= run.longest_step_s:
                    return None
                limit = f"there is progress, but for more than {STEP_STALLS} times {limit}"
        if self._coordinator.finished:
            since_s = now_s - self._step_s
            return self.stall(f"the run has not ended for {since_s:.0f} s after its last step ({limit})")
        return self._stall_of_step(limit)

    def _stall_of_step(self, limit: str) -> Stall:
        """If groups are dropped, that is the cause and comes first."""
        now_s = self._now_s()
        stall = self.stall(f"no training step has ended for {now_s - self._step_s:.0f} s ({limit})")
        drops, stale = self._drops, self._stale - self._stale_before
        if self._is_the_trainer_s_turn or not self.has_weights:
            return stall  # everything waits for something else than the dropped groups
        if drops.groups and now_s - drops.last_s <= self._run.stall_s:
            is_final = drops.lasted_s(now_s) > self._run.stall_s
            text = f"{drops.cause()} So {stall.text}"
            return msgspec.structs.replace(stall, text=text, culprits=(), is_final=is_final)
        if stale:
            cause = (
                f"{stale:,} groups were dropped since the last step because they were too stale for the next "
                "one (staleness.on_stale); use staleness.on_stale=wait, or a higher staleness.max_staleness."
            )
            return msgspec.structs.replace(stall, text=f"{cause} So {stall.text}")
        return stall

    @property
    def _stale(self) -> int:
        return self._coordinator.ledger.dropped_groups["stale"]

    def _look_at_work(self, pulses: Mapping[str, Pulse]) -> None:
        """Note whether what the next step needs has progressed."""
        moving = False
        for role, pulse in pulses.items():
            if role == RANK_0 or Role.parse(role).kind == REWARD:
                needed = self._is_the_trainer_s_turn == (role == RANK_0)
                moving |= needed and pulse.work is not None and pulse.work != self._work.get(role)
                waits_for_it = role == RANK_0 and (needed or not self.has_weights)
                moving |= waits_for_it and pulse.work is None and pulse.unhurried is not None
                self._work[role] = pulse.work
        if moving:
            self._moved_s = self._now_s()
        if not self._is_the_trainer_s_turn and self.has_weights:
            holders = {e.worker for e in self._coordinator.waits_for() if e.state is GroupState.LEASED}
            generated_s = (w.generated_s for name, w in self._workers.items() if name in holders)
            self._moved_s = max([self._moved_s, *generated_s])

    def stall(self, what: str) -> Stall:
        """Report a stall. The next one can follow after another `run.stall_s`."""
        self._since_s = self._now_s()
        return Stall(f"{what}. {self._explain()}", self._culprits(), self._coordinator.version)

    def _starting(self, pulses: Mapping[str, Pulse]) -> tuple[str, ...]:
        """The roles that are not up (again) yet: everything may be waiting for one of them."""
        return tuple(role for role in self._roles if role not in pulses and not self.sleeps(role))

    def _culprits(self) -> tuple[str, ...]:
        if self.behind:
            return self.behind
        if self._starting(self._pulses()):
            return ()  # the supervisor replaces roles that do not come up
        if self._is_the_trainer_s_turn or not self.has_weights:
            return (RANK_0,)
        leased = [e for e in self._coordinator.waits_for() if e.state is GroupState.LEASED]
        if leased:
            return (min(leased, key=lambda e: self._leased_s.get(e.group_id, self._begun_s)).worker,)
        # Nobody has leased what the step waits for: admission is blocked by a worker that is silent or
        # samples with old weights.
        now_s, pulses = self._now_s(), self._pulses()
        loaded = {n: w for n, w in self._workers.items() if n in pulses}  # a guest may still load its engine
        silent = [n for n, w in loaded.items() if now_s - w.last_heard_s > self._run.stall_s / 2]
        versions = {n: -1 if (v := w.engine_version) is None else v for n, w in loaded.items()}
        return tuple(silent or [n for n, v in versions.items() if v < self._coordinator.version])

    @property
    def _is_the_trainer_s_turn(self) -> bool:
        """Whether the next step, or the end of the run, depends on the trainer alone."""
        return self._trainer_has_a_batch or self._coordinator.finished

    @property
    def _trainer_has_a_batch(self) -> bool:
        return self._coordinator.steps_taken > self._coordinator.version

    def _explain(self) -> str:
        """Who waits for whom, for what, since when."""
        now_s, version, pulses = self._now_s(), self._coordinator.version, self._pulses()
        starting = [f"The trainer waits for {', '.join(self.behind)}."] if self.behind else []
        starting += [f"{role} has not come up yet." for role in self._starting(pulses)]
        if self._coordinator.finished:
            ranks = {role: pulse for role, pulse in pulses.items() if Role.parse(role).kind == TRAINER}
            done = f"The trainer has done all {version} steps but has not ended."
            return " ".join([done, *starting, *describe_waits(ranks, time.time())])
        if self._trainer_has_a_batch:
            trainer = f"has had the batch of step {version} for {now_s - self._taken_s:.0f} s"
        elif not self.has_weights:
            trainer = "has not published any weights since it started"
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
            lines.append(
                f"{name} has {has}, last reported {now_s - worker.last_heard_s:.0f} s ago and sampled its "
                f"last token {now_s - worker.generated_s:.0f} s ago."
            )
        if not self._workers:
            lines.append("No rollout worker is connected.")
        lines += starting
        lines += describe_waits(pulses, time.time())
        ledger = self._coordinator.ledger
        if ledger.dropped_groups:
            lines.append(f"Groups dropped so far: {dict(ledger.dropped_groups)}.")
        lines += [f"The latest failed attempt: {detail}" for detail in list(ledger.failures.values())[-1:]]
        return " ".join(lines)
