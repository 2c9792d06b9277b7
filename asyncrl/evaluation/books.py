"""The books of evaluation: which held-out prompts are sampled by which weights, and what came of them.

Evaluation passes the ledger by: its leases hold no place of admission, and its groups enter no batch. All of
this is lost with the process; a round that was not finished is then begun anew."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from asyncrl.core.records import GroupSummary, Lease, Submission

P = TypeVar("P")
"""A finished group's payload: opaque here."""


@dataclass(slots=True)
class EvaluationRound(Generic[P]):
    """One pass over the held-out prompts, every token of it sampled by the weights of one version.

    An engine that has moved on gets no more of it: one must stay at this version until the round is done.
    """

    due: int
    """The version at which it is due."""
    to_lease: list[tuple[int, int]]
    """Row and attempt of the prompts that nobody has."""
    version: int | None = None
    """The version that is evaluated: that of the first engine that asked once the round was due."""
    groups: dict[int, P] = field(default_factory=dict)
    """Finished ones, by row."""
    failed: dict[int, str] = field(default_factory=dict)
    """Why the last attempt at a prompt failed, by row."""


class EvaluationBooks(Generic[P]):
    """Leases the prompts of the rounds that are due, and keeps what comes back.

    rows: held-out prompts. every: a round is due at each version that is a multiple. next_lease_id: numbers
    leases.
    """

    def __init__(self, rows: int, every: int, max_attempts: int, next_lease_id: Callable[[], int]) -> None:
        self._rows = rows
        self._every = every
        self._max_attempts = max_attempts
        self._next_lease_id = next_lease_id
        self.rounds: list[EvaluationRound[P]] = []
        """In the order in which they were due."""
        self._leased: dict[int, tuple[str, EvaluationRound[P], Lease]] = {}
        """By lease id: who has it, of which round it is."""

    @property
    def finished(self) -> bool:
        """Every round that was due is done."""
        return not self._leased and not any(one.to_lease for one in self.rounds)

    def published(self, version: int) -> None:
        """Weights are out. Repeating it is harmless, and so is a trainer that goes back to a checkpoint: a
        round that was due is not due again."""
        if version % self._every == 0 and all(one.due < version for one in self.rounds):
            self.rounds.append(EvaluationRound(version, [(row, 0) for row in range(self._rows)]))

    def lease(self, worker: str, engine_version: int, limit: int) -> list[Lease]:
        """Hand out up to `limit` prompts to a worker whose engine samples with `engine_version`."""
        leases: list[Lease] = []
        for one in self.rounds:
            version = engine_version if one.version is None else one.version
            while one.due <= version == engine_version and one.to_lease and len(leases) < limit:
                row, attempt = one.to_lease.pop(0)
                lease = Lease(self._next_lease_id(), row, row, attempt)
                one.version, self._leased[lease.lease_id] = version, (worker, one, lease)
                leases.append(lease)
        return leases

    def submit(self, group_id: int, lease_id: int, summary: GroupSummary, payload: P) -> Submission:
        """As `Coordinator.submit`. A group that an update of the weights has overtaken is dropped, and its
        prompt leased again."""
        if (ended := self._ended(group_id, lease_id)) is None:
            return Submission.SETTLED
        one, lease = ended
        if set(summary.tokens_by_version) != {one.version}:
            one.to_lease.append((lease.row, lease.attempt))
            return Submission.DROPPED
        one.groups[lease.row] = payload
        return Submission.ACCEPTED

    def fail(
        self, group_id: int, lease_id: int, reason: str, detail: str = "", sampled_tokens: int = 0
    ) -> bool:
        """As `Coordinator.fail`."""
        if (ended := self._ended(group_id, lease_id)) is None:
            return False
        one, lease = ended
        if again := lease.attempt + 1 < self._max_attempts:
            one.to_lease.append((lease.row, lease.attempt + 1))
        else:
            one.failed[lease.row] = detail or reason
        return again

    def worker_lost(self, worker: str) -> list[int]:
        """A worker died: its leases end, and their prompts go back. Returns the groups concerned."""
        lost = self.leases_of(worker)
        for lease in lost:
            _, one, _ = self._leased.pop(lease.lease_id)
            one.to_lease.append((lease.row, lease.attempt))
        return [lease.group_id for lease in lost]

    def leases_of(self, worker: str) -> list[Lease]:
        """What a worker has leased and not handed in."""
        return [lease for who, _, lease in self._leased.values() if who == worker]

    def _ended(self, group_id: int, lease_id: int) -> tuple[EvaluationRound[P], Lease] | None:
        """Settle a lease; None where there is no such lease."""
        _, one, lease = self._leased.get(lease_id, ("", None, None))
        if one is None or lease is None or lease.group_id != group_id:
            return None
        del self._leased[lease_id]
        return one, lease
