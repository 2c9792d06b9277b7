"""Where every group and every token went. The books close after every event, or the run stops (invariant
3)."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from enum import StrEnum

from asyncrl.core.invariants import InvariantError
from asyncrl.errors import RunFailed

MIN_GROUPS_TO_JUDGE = 20
"""Finished groups before the share of the failed ones means anything."""


class TooManyFailures(RunFailed):
    """More rollouts fail than `run.max_failed_share` allows."""


class GroupState(StrEnum):
    """Where a group is. The first four are in flight and hold an admission place, the others are final."""

    QUEUED = "queued"
    """Given back by a lost worker or a failed attempt; the next lease takes it."""
    LEASED = "leased"
    READY = "ready"
    TAKEN = "taken"
    """In a batch that the trainer has, but has not published yet."""
    TRAINED = "trained"
    DROPPED = "dropped"
    FAILED = "failed"

    @property
    def in_flight(self) -> bool:
        return self in _IN_FLIGHT


_IN_FLIGHT = frozenset({GroupState.QUEUED, GroupState.LEASED, GroupState.READY, GroupState.TAKEN})


@dataclass(slots=True)
class Ledger:
    """Counts of groups and of sampled tokens by state. Tokens are known once a group is submitted, or
    when an attempt at it fails (`tokens[FAILED]`, whatever becomes of the group)."""

    generated_groups: int = 0
    """Groups admitted."""
    generated_tokens: int = 0
    """Sampled tokens of submitted groups, with what they left out, and of failed attempts."""
    groups: Counter[GroupState] = field(default_factory=Counter)
    tokens: Counter[GroupState] = field(default_factory=Counter)
    masked_tokens: int = 0
    """Tokens of trained groups that were too old to contribute; part of `tokens[TRAINED]`."""
    dropped_groups: Counter[str] = field(default_factory=Counter)
    """Dropped groups by reason."""
    failed_groups: Counter[str] = field(default_factory=Counter)
    """Failed groups by reason."""
    failures: dict[str, str] = field(default_factory=dict)
    """The latest failed attempt of each reason, in full."""
    returned_leases: int = 0
    """Leases that came back unfinished, because a worker was lost or an attempt failed."""

    def admit(self) -> None:
        self.generated_groups += 1
        self.groups[GroupState.LEASED] += 1

    def move(self, old: GroupState, new: GroupState, tokens: int = 0) -> None:
        """A group of `tokens` sampled tokens changes its state."""
        if self.groups[old] < 1 or not old.in_flight:
            raise InvariantError(3, f"a group moves from {old} to {new}, but none is {old}")
        self.groups[old] -= 1
        self.groups[new] += 1
        if old in (GroupState.LEASED, GroupState.QUEUED):  # its tokens are new to the books
            self.generated_tokens += tokens
        else:
            self.tokens[old] -= tokens
        self.tokens[new] += tokens

    def untrain(self, tokens: int, masked_tokens: int) -> None:
        """A trained group is ready again: the trainer went back to weights from before it."""
        self.groups[GroupState.TRAINED] -= 1
        self.groups[GroupState.READY] += 1
        self.tokens[GroupState.TRAINED] -= tokens
        self.tokens[GroupState.READY] += tokens
        self.masked_tokens -= masked_tokens

    def lose(self, tokens: int, to: GroupState = GroupState.FAILED) -> None:
        """Tokens that a failed attempt had sampled, or (dropped) that are of no member of their group."""
        self.generated_tokens += tokens
        self.tokens[to] += tokens

    @property
    def in_flight(self) -> int:
        return sum(self.groups[state] for state in _IN_FLIGHT)

    @property
    def finished_groups(self) -> int:
        """Groups whose rollout has ended one way or the other."""
        return self.generated_groups - self.groups[GroupState.QUEUED] - self.groups[GroupState.LEASED]

    def judge_failures(self, max_failed_share: float) -> None:
        """Raise `TooManyFailures` when a larger share of the finished groups has failed."""
        failed = self.groups[GroupState.FAILED]
        if self.finished_groups < MIN_GROUPS_TO_JUDGE or failed <= max_failed_share * self.finished_groups:
            return
        worst = self.failed_groups.most_common(5)
        reasons = "\n".join(f"  {n} x {reason}" for reason, n in worst)
        example = self.failures.get(worst[0][0], worst[0][0])
        raise TooManyFailures(
            f"{failed} of {self.finished_groups} finished groups failed, more than "
            f"run.max_failed_share={max_failed_share}:\n{reasons}\nThe latest of the first kind: {example}"
        )

    def check(self) -> None:
        """Raise `InvariantError` unless the books close, for groups and for tokens."""
        if self.generated_groups != sum(self.groups.values()):
            raise InvariantError(
                3, f"{self.generated_groups} groups generated, accounted for: {dict(self.groups)}"
            )
        if self.generated_tokens != sum(self.tokens.values()):
            raise InvariantError(
                3, f"{self.generated_tokens} tokens generated, accounted for: {dict(self.tokens)}"
            )
        for state, reasons in (
            (GroupState.DROPPED, self.dropped_groups),
            (GroupState.FAILED, self.failed_groups),
        ):
            if self.groups[state] != sum(reasons.values()):
                raise InvariantError(3, f"{self.groups[state]} groups {state}, by reason: {dict(reasons)}")
        lowest = min(min(counts.values(), default=0) for counts in (self.groups, self.tokens))
        if lowest < 0 or self.masked_tokens > self.tokens[GroupState.TRAINED]:
            raise InvariantError(
                3, f"counts out of range: {self.groups}, {self.tokens}, {self.masked_tokens} masked tokens"
            )

    def metrics(self) -> dict[str, int]:
        """The ledger's line in `metrics.jsonl`. Closes as generated = trained + dropped + failed + in flight
        for groups, and with `masked_tokens` apart from `trained_tokens` for tokens."""
        in_flight_tokens = sum(n for state, n in self.tokens.items() if state.in_flight)
        return {
            "ledger/generated_groups": self.generated_groups,
            "ledger/trained_groups": self.groups[GroupState.TRAINED],
            "ledger/failed_groups": self.groups[GroupState.FAILED],
            "ledger/dropped_groups": self.groups[GroupState.DROPPED],
            "ledger/in_flight_groups": self.in_flight,
            "ledger/returned_leases": self.returned_leases,
            "ledger/generated_tokens": self.generated_tokens,
            "ledger/trained_tokens": self.tokens[GroupState.TRAINED] - self.masked_tokens,
            "ledger/masked_tokens": self.masked_tokens,
            "ledger/dropped_tokens": self.tokens[GroupState.DROPPED],
            "ledger/failed_tokens": self.tokens[GroupState.FAILED],
            "ledger/in_flight_tokens": in_flight_tokens,
            "buffer/leased_groups": self.groups[GroupState.LEASED],
            "buffer/queued_groups": self.groups[GroupState.QUEUED],
            "buffer/ready_groups": self.groups[GroupState.READY],
            "buffer/taken_groups": self.groups[GroupState.TAKEN],
        } | {f"ledger/dropped/{reason}": n for reason, n in self.dropped_groups.items()}
