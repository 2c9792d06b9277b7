"""The coordinator: admission, buffer and ledger as one pure state machine.

Events come in as method calls, decisions come back as values; there is no socket, clock, thread or torch in
here. The same object runs behind the ZMQ service, in `inline` mode and under hypothesis. What must survive a
crash is handed out by `drain_changes` after each event; whoever hosts the coordinator stores it before
answering, and `restore` takes it back."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, Literal, TypeVar

from asyncrl.core.cursor import PromptCursor
from asyncrl.core.invariants import InvariantError
from asyncrl.core.ledger import GroupState, Ledger
from asyncrl.core.records import GroupSummary, Lease, Submission
from asyncrl.core.staleness import BatchChoice, Candidate, Due, admission_limit, choose_batch, waited_for

P = TypeVar("P")
"""A finished group's payload: opaque here (arrays, wire frames, ...)."""

Filter = Callable[[int, GroupSummary], str | None]
"""Why a finished group (its row, and what is known of it) is dropped; None where it is not."""

OnStale = Literal["wait", "mask", "drop"]

NEVER = 2**53
"""Later than any step."""
RECENT = 0.25
"""What the newest batch counts in `Coordinator.group_tokens`."""


@dataclass(frozen=True, slots=True)
class LoopSettings:
    """The part of the config that the coordinator decides by."""

    batch_groups: int
    max_staleness: int
    on_stale: OnStale
    total_steps: int
    filters: tuple[Filter, ...] = ()
    max_attempts: int = 3
    fixed_lag: int | None = None
    """Every token of step v has staleness min(fixed_lag, v), neither more nor less."""
    batch_tokens: int | None = None
    """A batch ends as soon as it has so many sampled tokens, and at `batch_groups`."""

    @property
    def bound(self) -> int:
        """Largest staleness of a trained token."""
        return self.max_staleness if self.fixed_lag is None else self.fixed_lag


@dataclass(slots=True)
class GroupEntry:
    """One group's line in the ledger."""

    group_id: int
    row: int
    state: GroupState
    admitted_version: int
    """Version of the engine that its current lease was given to: none of its tokens is older."""
    attempt: int
    lease_id: int
    worker: str
    summary: GroupSummary | None = None
    step: int | None = None
    """Training step of the batch that took it. A ready group that has one is bound to that step: the trainer
    went back to before it."""
    reason: str | None = None
    """Why it was dropped, failed, or last given back."""
    masked_tokens: int = 0

    @property
    def sampled_tokens(self) -> int:
        return self.summary.sampled_tokens if self.summary is not None else 0

    @property
    def keys(self) -> Iterator[Hashable]:
        """What it is found by while it is in flight."""
        yield self.state
        if self.state is GroupState.LEASED:
            yield self.state, self.worker
        if self.step is not None:
            yield self.step


@dataclass(frozen=True, slots=True)
class Taken(Generic[P]):
    """The batch of training step `step`, in admission order. Tokens older than `oldest_version` must be
    masked."""

    step: int
    version: int
    oldest_version: int
    groups: tuple[tuple[GroupEntry, P], ...]


@dataclass(slots=True)
class Changes(Generic[P]):
    """What the last events changed and a crash must not undo."""

    entries: dict[int, GroupEntry] = field(default_factory=dict)
    payloads: dict[int, P | None] = field(default_factory=dict)
    """Payloads to keep, or (None) to forget, by group. Those of trained groups are kept until a checkpoint
    makes `rewind` to before them needless; when that is, the host of the coordinator knows."""


@dataclass(frozen=True, slots=True)
class Saved(Generic[P]):
    """A coordinator's durable state, the cursor apart, as `restore` takes it."""

    version: int
    frontier: int
    leases_given: int
    group_tokens: float
    ledger: Ledger
    live: Mapping[int, tuple[GroupEntry, P | None]]


class Coordinator(Generic[P]):
    """Owns the prompt cursor, the admission rule, the buffer and the ledger."""

    def __init__(self, settings: LoopSettings, cursor: PromptCursor) -> None:
        self._settings = settings
        self.cursor = cursor
        self.ledger = Ledger()
        self.version = 0
        """Weight versions published so far, the initial one not counted."""
        self.frontier = 0
        """The highest version that there has been. It is above `version` while a trainer that went back to a
        checkpoint trains the same batches again; engines may have it all along."""
        self.leases_given = 0
        """Leases are numbered from 0: no number comes twice, also after a restart."""
        self.steps_taken = 0
        """Batches handed to the trainer."""
        self.group_tokens = 0.0
        """Sampled tokens of a group, in the mean over those trained on of late; 0 while there are none."""
        self._live: dict[int, GroupEntry] = {}
        self._found: defaultdict[Hashable, dict[int, GroupEntry]] = defaultdict(dict)
        """The same by `GroupEntry.keys`: no event costs a look at all of them."""
        self._admitted: defaultdict[int, Counter[GroupState]] = defaultdict(Counter)
        """How many are in each state, by admission version."""
        self._payloads: dict[int, P] = {}
        self._changes: Changes[P] = Changes()

    # ---- workers -------------------------------------------------------------------------------------------

    def lease(self, worker: str, engine_version: int, limit: int) -> list[Lease]:
        """Hand out up to `limit` groups to a worker whose engine samples with `engine_version`.

        Groups that were given back go first: they have kept their place. New ones are admitted while
        invariant 2 allows it at the engine's own version (an engine that lags behind the trainer is bound by
        what it samples with)."""
        version = min(engine_version, self.frontier)
        eligible = [e for e in self._of(GroupState.QUEUED) if e.admitted_version <= version]
        leases = [self._lease_again(entry, worker, version) for entry in eligible[:limit]]
        while len(leases) < limit and self._places(version) > 0:
            leases.append(self._admit(worker, version))
        self.ledger.check()
        return leases

    def submit(self, group_id: int, lease_id: int, summary: GroupSummary, payload: P) -> Submission:
        """A worker delivers a finished, scored group. Submitting twice is harmless, and a lease that was
        given back (its worker was taken for lost, the coordinator restarted) still counts until the group is
        leased again."""
        entry = self._held(group_id, lease_id)
        if entry is None:
            return Submission.SETTLED
        if not summary.tokens_by_version:
            raise ValueError(f"group {group_id} of {entry.worker} holds no sampled token")
        if summary.oldest_version < entry.admitted_version or max(summary.tokens_by_version) > self.frontier:
            raise InvariantError(
                6,
                f"group {group_id} of {entry.worker} was leased at version {entry.admitted_version} and "
                f"submitted at {self.frontier}, but has tokens of {sorted(summary.tokens_by_version)}",
            )
        entry.summary = summary
        self.ledger.lose(summary.left_out.tokens, GroupState.DROPPED)
        if self.cursor.sampler is not None:
            rewards = (*summary.rewards, *summary.left_out.rewards)
            self.cursor.sampler.finished(entry.group_id, entry.row, rewards)
        reasons = (drops(entry.row, summary) for drops in self._settings.filters)
        if reason := next(filter(None, reasons), None):
            self._drop(entry, reason)
            self.ledger.check()
            return Submission.DROPPED
        self._payloads[entry.group_id] = payload
        self._changes.payloads[entry.group_id] = payload
        self._move(entry, GroupState.READY, entry.sampled_tokens)
        self.ledger.check()
        return Submission.ACCEPTED

    def fail(
        self, group_id: int, lease_id: int, reason: str, detail: str = "", sampled_tokens: int = 0
    ) -> bool | None:
        """A worker gives up an attempt. Returns whether the group will be tried again; None where the lease
        was settled before.

        reason: in few words, the same for failures of a kind: the ledger counts by it. detail: all of it.
        """
        entry = self._held(group_id, lease_id)
        if entry is None or entry.state is not GroupState.LEASED:
            return None
        self.ledger.lose(sampled_tokens)
        self.ledger.failures[reason] = detail or reason
        entry.attempt += 1
        again = entry.attempt < self._settings.max_attempts
        if again:
            self._requeue(entry, reason)
        else:
            self.ledger.returned_leases += 1
            self.ledger.failed_groups[reason] += 1
            entry.reason = reason
            self._finish(entry, GroupState.FAILED)
        self.ledger.check()
        return again

    def worker_lost(self, worker: str) -> list[int]:
        """A worker died: its leases go back. It costs no group an attempt: which of them it was, if any, that
        brought the worker down is not known. Returns the groups concerned."""
        return self._give_back((GroupState.LEASED, worker), f"worker {worker} was lost")

    def worker_leaves(self, worker: str, held: Collection[int]) -> list[int]:
        """A worker takes no more: its leases go back, but for those that it holds. Returns the groups
        concerned."""
        return self._give_back((GroupState.LEASED, worker), f"worker {worker} leaves", held)

    def all_workers_lost(self) -> list[int]:
        """All of them have died, or will not come back: every lease goes back."""
        return self._give_back(GroupState.LEASED, "the run was interrupted")

    def leases_of(self, worker: str) -> list[Lease]:
        """What a worker has leased and not handed in."""
        return [_lease_of(e) for e in self._of((GroupState.LEASED, worker))]

    def open_places(self, engine_version: int) -> int:
        """Groups that a worker with such an engine could lease now, were it alone."""
        version = min(engine_version, self.frontier)
        queued = sum(states[GroupState.QUEUED] for v, states in self._admitted.items() if v <= version)
        return queued + max(0, self._places(version))

    # ---- trainer -------------------------------------------------------------------------------------------

    def take(self, step: int) -> Taken[P] | None:
        """The batch of training step `step`, or None while it has to wait (see `waits_for`).

        Asking again for the step last taken gives the same batch, so that a lost answer loses nothing.
        """
        if step == self.steps_taken - 1 and step >= self.version:
            return self._batch(step, self._found[step])
        if step != self.steps_taken:
            raise ValueError(f"the trainer asks for step {step}, but step {self.steps_taken} comes next")
        if self._settings.on_stale != "wait":
            self._drop_stale(step)
        if self._must_wait(step) or not (batch := self._choose(step, self._last_needed()).batch):
            return None
        for group_id in batch:
            entry = self._live[group_id]
            self._move(entry, GroupState.TAKEN, entry.sampled_tokens, step=step)
        self.steps_taken += 1
        self.ledger.check()
        return self._batch(step, batch)

    def published(self, version: int) -> None:
        """The trainer has trained step `version - 1` and its weights are out. Repeating it is harmless."""
        if version <= self.version:
            return
        if version != self.version + 1 or version > self.steps_taken:
            raise ValueError(
                f"version {version} was published after {self.version}, {self.steps_taken} steps taken"
            )
        step = self.version
        oldest = self._oldest_version(step)
        self.version = version
        self.frontier = max(self.frontier, version)
        batch = self._of(step)
        mean = sum(entry.sampled_tokens for entry in batch) / len(batch)
        self.group_tokens += (mean - self.group_tokens) * (RECENT if self.group_tokens else 1)
        for entry in batch:
            assert entry.summary is not None
            entry.masked_tokens = entry.summary.tokens_older_than(oldest)
            self.ledger.masked_tokens += entry.masked_tokens
            self._finish(entry, GroupState.TRAINED)
        for emptied in [v for v, states in self._admitted.items() if not states.total()]:
            del self._admitted[emptied]
        self.ledger.check()

    def rewind(self, version: int, trained: Mapping[int, tuple[GroupEntry, P]]) -> None:
        """The trainer was started from the weights of `version`, a checkpoint or the initial ones: what it
        trained since is undone. Those batches, and those taken last, are handed out again, each to the very
        step that it was for. So nothing that was sampled is lost, and what follows them stays valid: the
        trainer comes back to the weights that sampled it.

        trained: by group, every group trained since, with its payload. Raises `ValueError` when they are not
        what the ledger says, or the ledger does not reach as far as the checkpoint.
        """
        steps = range(version, self.version)
        per_step = Counter(entry.step for entry, _ in trained.values())
        if version > self.version:
            raise ValueError(f"the trainer has version {version}, and the ledger ends at {self.version}")
        s = self._settings
        is_whole = per_step == dict.fromkeys(steps, s.batch_groups)
        if set(per_step) != set(steps) or not (is_whole or s.batch_tokens):
            raise ValueError(
                f"the trainer has version {version} and the ledger {self.version}, but of the groups trained "
                f"since, the ledger has these by step: {dict(per_step)}"
            )
        for entry in self._of(GroupState.TAKEN):
            self._move(entry, GroupState.READY, entry.sampled_tokens)
        for group_id, (entry, payload) in trained.items():
            self.ledger.untrain(entry.sampled_tokens, entry.masked_tokens)
            entry.state, entry.masked_tokens = GroupState.READY, 0
            self._add(entry)
            self._payloads[group_id] = payload
            self._changes.entries[group_id] = entry
        self._live = dict(sorted(self._live.items()))
        self.version = self.steps_taken = version
        self.ledger.check()

    def waits_for(self) -> list[GroupEntry]:
        """The unfinished groups that the next batch waits for, oldest first; empty when more must be
        admitted."""
        return [self._live[group_id] for group_id in self._choose(self.steps_taken).waits_for]

    @property
    def finished(self) -> bool:
        return self.version >= self._settings.total_steps

    # ---- durability ----------------------------------------------------------------------------------------

    def drain_changes(self) -> Changes[P]:
        """What has changed since the last call."""
        changes, self._changes = self._changes, Changes()
        return changes

    @classmethod
    def restore(cls, settings: LoopSettings, cursor: PromptCursor, saved: Saved[P]) -> Coordinator[P]:
        """Go on from a durable state, as if nothing had happened: leases are still with their workers, taken
        batches with the trainer. Which of those are gone is for others to say (`worker_lost`, `rewind`)."""
        coordinator = cls(settings, cursor)
        coordinator.ledger = saved.ledger
        coordinator.version, coordinator.frontier = saved.version, saved.frontier
        coordinator.leases_given = saved.leases_given
        coordinator.group_tokens = saved.group_tokens
        for group_id, (entry, payload) in sorted(saved.live.items()):
            coordinator._add(entry)
            if payload is not None:
                coordinator._payloads[group_id] = payload
        taken = {e.step for e in coordinator._of(GroupState.TAKEN)}
        coordinator.steps_taken = saved.version + len(taken)
        coordinator.ledger.check()
        return coordinator

    # ---- inside --------------------------------------------------------------------------------------------

    def _places(self, version: int) -> int:
        """Groups that may be admitted at an engine's version."""
        s, ledger, step = self._settings, self.ledger, self.steps_taken
        bound: list[GroupEntry] = []
        while step in self._found:  # it has its batch already, as large as that may be
            bound += self._found[step].values()
            step += 1
        # No group beyond those that the run's steps will train on: it could only be thrown away.
        limit = min(admission_limit(version, s.bound, s.batch_groups), s.total_steps * s.batch_groups)
        limit -= step * s.batch_groups
        places = limit - (ledger.in_flight - ledger.groups[GroupState.TAKEN] - len(bound))
        if s.batch_tokens is None:
            return places
        size = self.group_tokens or s.batch_tokens / s.batch_groups
        share = max(s.batch_tokens, size) / s.batch_groups  # no batch is without a group
        ready = ledger.tokens[GroupState.READY] - sum(entry.sampled_tokens for entry in bound)
        unfinished = ledger.groups[GroupState.QUEUED] + ledger.groups[GroupState.LEASED]
        return min(places, math.ceil((limit * share - ready) / size - unfinished))

    def _admit(self, worker: str, version: int) -> Lease:
        entry = GroupEntry(
            group_id=self.ledger.generated_groups,
            row=self.cursor.next(self.version),
            state=GroupState.LEASED,
            admitted_version=version,
            attempt=0,
            lease_id=self._next_lease_id(),
            worker=worker,
        )
        self._add(entry)
        self._changes.entries[entry.group_id] = entry
        self.ledger.admit()
        return _lease_of(entry)

    def _next_lease_id(self) -> int:
        self.leases_given += 1
        return self.leases_given - 1

    def _lease_again(self, entry: GroupEntry, worker: str, version: int) -> Lease:
        lease_id = self._next_lease_id()
        self._move(entry, GroupState.LEASED, lease_id=lease_id, worker=worker, admitted_version=version)
        return _lease_of(entry)

    def _give_back(self, key: Hashable, reason: str, held: Collection[int] = ()) -> list[int]:
        leased = [entry for entry in self._of(key) if entry.lease_id not in held]
        for entry in leased:
            self._requeue(entry, reason)
        self.ledger.check()
        return [entry.group_id for entry in leased]

    def _requeue(self, entry: GroupEntry, reason: str) -> None:
        self.ledger.returned_leases += 1
        entry.reason = reason
        self._move(entry, GroupState.QUEUED)

    def _drop(self, entry: GroupEntry, reason: str) -> None:
        self.ledger.dropped_groups[reason] += 1
        entry.reason = reason
        self._finish(entry, GroupState.DROPPED)

    def _finish(self, entry: GroupEntry, state: GroupState) -> None:
        self._move(entry, state, entry.sampled_tokens)
        self._remove(entry)
        del self._live[entry.group_id]
        if self._payloads.pop(entry.group_id, None) is not None and state is not GroupState.TRAINED:
            self._changes.payloads[entry.group_id] = None

    def _move(self, entry: GroupEntry, state: GroupState, tokens: int = 0, **fields: Any) -> None:
        """Whatever it is found by changes here only."""
        self._remove(entry)
        self.ledger.move(entry.state, state, tokens)
        entry.state = state
        for name, value in fields.items():
            setattr(entry, name, value)
        self._add(entry)
        self._changes.entries[entry.group_id] = entry

    def _add(self, entry: GroupEntry) -> None:
        self._live[entry.group_id] = entry
        self._admitted[entry.admitted_version][entry.state] += 1
        for key in entry.keys:
            self._found[key][entry.group_id] = entry

    def _remove(self, entry: GroupEntry) -> None:
        self._admitted[entry.admitted_version][entry.state] -= 1
        for key in entry.keys:
            del self._found[key][entry.group_id]
            if not self._found[key]:
                del self._found[key]

    def _of(self, key: Hashable) -> list[GroupEntry]:
        """Those in flight that have the key, in admission order."""
        return [entry for _, entry in sorted(self._found.get(key, {}).items())]

    def _held(self, group_id: int, lease_id: int) -> GroupEntry | None:
        """The entry that a lease stands for, while no other lease has taken its place."""
        entry = self._live.get(group_id)
        if entry is None or entry.lease_id != lease_id:
            return None
        return entry if entry.state in (GroupState.LEASED, GroupState.QUEUED) else None

    def _must_wait(self, step: int) -> bool:
        """Whether there cannot be a batch yet, told without a look at the groups: the trainer asks after
        every event."""
        s = self._settings
        if self._found.get(step):
            return False
        due = [
            Due(self._deadline(v), states.total() - states[GroupState.TAKEN], states[GroupState.READY])
            for v, states in sorted(self._admitted.items())
        ]
        enough = s.batch_tokens is not None and self.ledger.tokens[GroupState.READY] >= s.batch_tokens
        return waited_for(due, step, s.batch_groups, enough) is not None

    def _last_needed(self) -> int:
        """The admission version up to which the groups of the next batch are found, if nothing has to be
        waited for. Of those in flight that leaves one batch in η + 1 to be looked at."""
        s, ready = self._settings, 0
        if s.on_stale == "wait" and s.batch_tokens is None:
            for version, states in sorted(self._admitted.items()):
                ready += states[GroupState.READY]
                if ready >= s.batch_groups:
                    return version
        return NEVER

    def _choose(self, step: int, last: int = NEVER) -> BatchChoice:
        """last: later admission versions are left out."""
        bound_to_it = tuple(e.group_id for e in self._of(step))
        if bound_to_it:
            return BatchChoice(batch=bound_to_it)
        if self._settings.fixed_lag is not None and not self._sampled_out(step):
            return BatchChoice(waits_for=tuple(e.group_id for e in self._unfinished()))
        s, deadlines = self._settings, {v: self._deadline(v) for v in self._admitted}
        candidates = [
            Candidate(
                *(e.group_id, deadlines[e.admitted_version], e.state is GroupState.READY),
                tokens=e.sampled_tokens if s.batch_tokens else 0,
            )
            for e in self._live.values()
            if e.admitted_version <= last and e.state is not GroupState.TAKEN
        ]
        late = [c for c in candidates if c.deadline < step and c.ready]
        if late:
            raise InvariantError(
                1, f"groups {[c.group_id for c in late]} were not trained by their last step, {step}"
            )
        return choose_batch(candidates, step, s.batch_groups, s.batch_tokens)

    def _deadline(self, admitted_version: int) -> int:
        """Last step in which all tokens of such a group are fresh; where no group is waited for, any is."""
        return admitted_version + self._settings.bound if self._settings.on_stale == "wait" else NEVER

    def _sampled_out(self, step: int) -> bool:
        """Version `step` is out, and everything that its weights may sample is finished.

        Under a fixed lag k no step is taken before. So no group sees two versions, version 0 samples the
        first k + 1 batches and every later one a single batch, of which the earliest deadlines are those of
        version `step - k`: the bound of k is reached by every token."""
        return self.version == step and self._places(step) <= 0 and not self._unfinished()

    def _drop_stale(self, step: int) -> None:
        """Drop ready groups that `on_stale` does not let into step `step`; under `drop` their prompts come
        again."""
        oldest = self._oldest_version(step)
        for entry in self._of(GroupState.READY):
            assert entry.summary is not None
            stale = entry.summary.tokens_older_than(oldest)
            if stale == entry.sampled_tokens or (stale and self._settings.on_stale == "drop"):
                self.cursor.give_back(entry.row)
                self._drop(entry, "stale")

    def _batch(self, step: int, group_ids: Iterable[int]) -> Taken[P]:
        groups = tuple((self._live[g], self._payloads[g]) for g in sorted(group_ids))
        for entry, _ in groups:
            self._check_age(entry, step)
        return Taken(step, step, self._oldest_version(step), groups)

    def _check_age(self, entry: GroupEntry, step: int) -> None:
        """Invariant 1, on a group of step `step`'s batch."""
        assert entry.summary is not None
        oldest, versions = self._oldest_version(step), sorted(entry.summary.tokens_by_version)
        if self._settings.on_stale != "mask" and versions[0] < oldest:
            raise InvariantError(
                1,
                f"group {entry.group_id} has tokens of version {versions[0]}, and step {step} allows none "
                f"before {oldest}",
            )
        if self._settings.fixed_lag is not None and versions[-1] > max(0, oldest):
            raise InvariantError(
                1,
                f"group {entry.group_id} has tokens of version {versions[-1]}, and under the fixed lag "
                f"{self._settings.fixed_lag} step {step} trains on version {max(0, oldest)} only",
            )

    def _oldest_version(self, step: int) -> int:
        return step - self._settings.bound

    def _unfinished(self) -> list[GroupEntry]:
        return [e for e in self._live.values() if e.state in (GroupState.QUEUED, GroupState.LEASED)]


def _lease_of(entry: GroupEntry) -> Lease:
    return Lease(entry.lease_id, entry.group_id, entry.row, entry.attempt, entry.admitted_version)
