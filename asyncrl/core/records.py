"""The records that travel through the loop: trajectories, groups and what the coordinator needs to know of
them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from itertools import chain
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from asyncrl.core.kept import KeptSets

NOT_SAMPLED = -1
"""The token version of a token that no policy sampled (prompt, tool output)."""


class Purpose(StrEnum):
    """What a group is sampled for."""

    TRAIN = "train"
    EVAL = "eval"
    """To measure a version by held-out prompts (`evaluation`)."""


@dataclass(frozen=True, slots=True)
class Lease:
    """A group handed to a worker. (`group_id`, `attempt`) seed its sampling.

    lease_id: no number comes twice, also after a restart of the coordinator. row: of the prompt. version: no
    token of it may be older.
    """

    lease_id: int
    group_id: int
    row: int
    attempt: int
    version: int


class Submission(StrEnum):
    """What became of a submitted group. The worker is done with it in every case."""

    ACCEPTED = "accepted"
    DROPPED = "dropped"
    SETTLED = "settled"
    """Nothing to do: the lease was settled before (a repeated message), or the group was given to another
    worker."""


class FinishReason(StrEnum):
    """Why a trajectory ended. The end of a sequence is read from here, never inferred from its length."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    ERROR = "error"


@dataclass(frozen=True, slots=True)
class VersionSpan:
    """Tokens `start .. start + length` of a sequence, all sampled by the weights of `version`."""

    start: int
    length: int
    version: int


@dataclass(slots=True)
class Trajectory:
    """One sampled sequence: of a group's member, all or a segment. T counts all its tokens, those of the
    prompt included.

    token_ids: int32[T].
    loss_mask: bool[T], True where the policy sampled the token.
    behavior_logprobs: float32[T], the log-probability under the distribution that really sampled the token
        (after temperature, top-p, ...); 0 where not sampled.
    versions: run-length token versions over the sampled tokens, in order, not overlapping.
    reward: the composed reward; `reward_parts` holds its parts by name.
    kept: of all T tokens, what each was sampled among; None where that was always the whole vocabulary, or is
        not known.
    segment: number of the segment; above 0 it is of the same member as the trajectory before it, and has the
        same reward.
    turns: where its member made several requests: the number of each one that is trained on, and the position
        of its last token.
    turn_parts: where the reward was earned by turns, of each part by name what each of these `turns` has
        earned; the segment's last one has all that came later.
    turn_rewards: likewise the share of the reward, with its position.
    """

    token_ids: NDArray[np.int32]
    loss_mask: NDArray[np.bool_]
    behavior_logprobs: NDArray[np.float32]
    versions: tuple[VersionSpan, ...]
    finish_reason: FinishReason
    reward: float = float("nan")
    reward_parts: dict[str, float] = field(default_factory=dict)
    metadata: dict[str, Any] = field(default_factory=dict)
    kept: KeptSets | None = None
    segment: int = 0
    turns: tuple[tuple[int, int], ...] = ()
    turn_parts: dict[str, tuple[float, ...]] = field(default_factory=dict)
    turn_rewards: tuple[tuple[int, float], ...] = ()

    @property
    def sampled_tokens(self) -> int:
        return sum(span.length for span in self.versions)

    def token_versions(self) -> NDArray[np.int32]:
        """int32[T]: the version that sampled each token, `NOT_SAMPLED` elsewhere."""
        versions = np.full(len(self.token_ids), NOT_SAMPLED, dtype=np.int32)
        for span in self.versions:
            versions[span.start : span.start + span.length] = span.version
        return versions


@dataclass(frozen=True, slots=True)
class LeftOut:
    """Of responses that were sampled for a group and do not belong to it, since others were chosen."""

    tokens: int = 0
    rewards: tuple[float, ...] = ()
    """Of those that were scored."""


@dataclass(slots=True)
class Group:
    """One prompt with its sampled trajectories: the unit of admission, of advantage and of training."""

    group_id: int
    row: int
    """Index of the prompt in the dataset."""
    trajectories: list[Trajectory]
    left_out: LeftOut = LeftOut()

    def summary(self) -> GroupSummary:
        return GroupSummary.of(self.trajectories, self.left_out)

    def members(self) -> list[list[Trajectory]]:
        """The segments of each member, whose rewards are the same."""
        members: list[list[Trajectory]] = []
        for trajectory in self.trajectories:
            if trajectory.segment == 0:
                members.append([])
            members[-1].append(trajectory)
        return members


class Told(Protocol):
    """What of a trajectory the coordinator is told."""

    @property
    def versions(self) -> Sequence[VersionSpan]: ...
    @property
    def reward(self) -> float: ...
    @property
    def segment(self) -> int: ...


@dataclass(frozen=True, slots=True)
class GroupSummary:
    """What the coordinator knows of a finished group; the arrays pass it by unread."""

    tokens_by_version: dict[int, int]
    """Number of sampled tokens by token version."""
    rewards: tuple[float, ...]
    """Of each member."""
    left_out: LeftOut = LeftOut()

    @classmethod
    def of(cls, trajectories: Sequence[Told], left_out: LeftOut) -> GroupSummary:
        tokens: defaultdict[int, int] = defaultdict(int)
        for span in chain.from_iterable(t.versions for t in trajectories):
            tokens[span.version] += span.length
        return cls(dict(tokens), tuple(t.reward for t in trajectories if t.segment == 0), left_out)

    @property
    def sampled_tokens(self) -> int:
        return sum(self.tokens_by_version.values())

    @property
    def oldest_version(self) -> int:
        return min(self.tokens_by_version)

    def tokens_older_than(self, version: int) -> int:
        return sum(n for v, n in self.tokens_by_version.items() if v < version)


@dataclass(frozen=True, slots=True)
class Batch:
    """What one training step trains on."""

    step: int
    """Number of training steps before this one."""
    version: int
    """The trainer's policy version: staleness of a token is this minus its token version."""
    oldest_version: int
    """Tokens sampled by older versions must not contribute to the gradient (`version - max_staleness`)."""
    groups: tuple[Group, ...]
    """In admission order."""
