"""From records to flat arrays, and to what a training step knows of each token.

Every per-token array keeps its value at the index of the token it belongs to; the one shift by a position
(the hidden state at t-1 predicts token t) happens in `asyncrl.trainer.packing.pack` and nowhere else.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from asyncrl.core.invariants import InvariantError
from asyncrl.core.kept import KeptSets
from asyncrl.core.records import NOT_SAMPLED, Batch, FinishReason, Group, Trajectory
from asyncrl.errors import AsyncRLError


class BatchError(AsyncRLError, ValueError):
    """A trajectory cannot be trained on. The message names the group, the trajectory and the value."""


@dataclass(frozen=True, slots=True)
class FlatBatch:
    """The sequences of a batch one after the other: S sequences, T tokens in all.

    Sequences are ordered by group id, so that nothing computed from this depends on the order of groups.
    """

    token_ids: NDArray[np.int64]
    """int64[T]."""
    loss_mask: NDArray[np.bool_]
    """bool[T]: sampled, not older than the batch allows, and not masked otherwise. Never the first token of a
    sequence."""
    behavior_logprobs: NDArray[np.float32]
    """float32[T]: of token t under what sampled it; 0 where not sampled."""
    ages: NDArray[np.int64]
    """int64[T], staleness: the trainer's version minus the token's; 0 where not sampled."""
    offsets: NDArray[np.int64]
    """int64[S+1]: sequence s is `offsets[s] .. offsets[s + 1]`."""
    group_ids: NDArray[np.int64]
    """int64[S]."""
    rewards: NDArray[np.float64]
    """float64[S]."""
    truncated: NDArray[np.bool_]
    """bool[S]: cut off at `rollout.max_new_tokens`, with nothing of its member after it."""
    sampled: NDArray[np.bool_]
    """bool[T]: by a policy; those not in `loss_mask` were too old, or of truncated responses."""
    kept: KeptSets | None = None
    """Of the T tokens; None where every one was sampled among the whole vocabulary, or it is not known."""
    members: NDArray[np.int64] | None = None
    """int64[S], ascending from 0: the member that each sequence is a segment of; None where each is one."""
    turn_rewards: NDArray[np.float32] | None = None
    """float32[T]: what is given at each token, where some rewards were earned by turns; others are given at
    the last sampled token."""
    turns: NDArray[np.int64] | None = None
    """int64[T]: which request of its member sampled each token that was; None where each member made one."""
    baselines: NDArray[np.float64] | None = None
    """float64[S]: what a greedy response to each one's prompt has earned; None where no advantage asks."""

    texts: FlatBatch | None = None
    """Sequences that nobody sampled, for the lesson that asks for them; None where none does."""

    @property
    def sequences(self) -> int:
        return len(self.rewards)

    @property
    def trained_tokens(self) -> int:
        return int(self.loss_mask.sum())

    def sequence_index(self) -> Tensor:
        """int64[T]: the sequence that each token belongs to."""
        return torch.from_numpy(np.repeat(np.arange(self.sequences), np.diff(self.offsets)))

    def first_segments(self) -> NDArray[np.int64]:
        """int64[M]: the first sequence of each member."""
        if self.members is None:
            return np.arange(self.sequences)
        return np.unique(self.members, return_index=True)[1]

    def trained_lengths(self) -> NDArray[np.int64]:
        """int64[S]: tokens of each sequence that a forward pass needs, which is up to the one before its
        last trained token; 0 for a sequence without any."""
        position = np.arange(len(self.token_ids)) - np.repeat(self.offsets[:-1], np.diff(self.offsets))
        return np.maximum.reduceat(np.where(self.loss_mask, position, 0), self.offsets[:-1])


@dataclass(frozen=True, slots=True)
class TokenBatch:
    """The T tokens of a batch, [T] each, on the policy's device.

    From the records: ids, ages (staleness in versions) and sequences (the index of each token's): int64;
    mask: bool, the tokens that are trained on; behavior_logprobs: float32, under what sampled them.

    From forward passes before the first update, float32, 0 where masked, None where nothing asks for it:
    start_logprobs: under the policy that the step starts from.
    prox_logprobs: under the proximal policy; None too where that is the policy itself (in a step's only
    update), or made of what the token brings along.
    values: V before each token, of the critic as it is now.
    score_norms: as of `objective.otb`.
    """

    ids: Tensor
    ages: Tensor
    sequences: Tensor
    mask: Tensor
    behavior_logprobs: Tensor
    start_logprobs: Tensor | None = None
    prox_logprobs: Tensor | None = None
    values: Tensor | None = None
    score_norms: Tensor | None = None

    @classmethod
    def of(cls, flat: FlatBatch, device: torch.device) -> Self:
        arrays = (flat.token_ids, flat.ages, flat.sequence_index(), flat.loss_mask, flat.behavior_logprobs)
        return cls(*(torch.as_tensor(array).to(device) for array in arrays))

    @property
    def log_ratio(self) -> Tensor:
        """float32[T]: log pi - log mu of the policy that the step starts from; 0 where masked."""
        return torch.where(self.mask, self.start_logprobs - self.behavior_logprobs, 0.0)


def flatten(batch: Batch, *, mask_truncated: bool = False, bootstraps: bool = False) -> FlatBatch:
    """The arrays of a batch. Tokens older than `batch.oldest_version` are masked, and with `mask_truncated`
    those of members that were cut off. With `bootstraps` these have no turn reward but what turns have
    earned: a value takes the place of theirs. Raises `BatchError` for records that contradict themselves, and
    for rewards and logprobs that are not finite."""
    if not batch.groups:
        raise BatchError(f"step {batch.step}: the batch has no groups")
    groups = sorted(batch.groups, key=lambda group: group.group_id)
    members = [(group, i, t) for group in groups for i, t in enumerate(group.trajectories)]
    for group, i, trajectory in members:
        _check(group, i, trajectory, batch.version)
    trajectories = [t for _, _, t in members]
    versions = np.concatenate([t.token_versions() for t in trajectories]).astype(np.int64)
    sampled = versions != NOT_SAMPLED
    lengths = [len(t.token_ids) for t in trajectories]
    fresh = versions >= batch.oldest_version
    truncated = np.array([t.finish_reason is FinishReason.LENGTH for t in trajectories])
    firsts = np.array([t.segment == 0 for t in trajectories])
    ends = truncated & np.append(firsts[1:], True)
    cut = np.logical_or.reduceat(truncated, np.flatnonzero(firsts))[np.cumsum(firsts) - 1]
    of_turns = {}
    if any(t.turns or t.turn_rewards for t in trajectories):
        from asyncrl.trainer.packing.turns import turn_arrays  # of episodes

        number = np.cumsum(firsts)
        of_turns = turn_arrays(trajectories, np.isin(number, number[ends]) & bootstraps)
    return FlatBatch(
        token_ids=np.concatenate([t.token_ids for t in trajectories]).astype(np.int64),
        loss_mask=sampled & fresh & ~np.repeat(cut & mask_truncated, lengths),
        behavior_logprobs=np.concatenate([t.behavior_logprobs for t in trajectories]).astype(np.float32),
        ages=np.where(sampled, batch.version - versions, 0),
        offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        group_ids=np.array([group.group_id for group, _, _ in members], dtype=np.int64),
        rewards=np.array([t.reward for t in trajectories], dtype=np.float64),
        truncated=ends,
        sampled=sampled,
        kept=KeptSets.join((t.kept, n) for t, n in zip(trajectories, lengths, strict=True)),
        members=None if firsts.all() else np.cumsum(firsts) - 1,
        **of_turns,
    )


def check_staleness(flat: FlatBatch, max_staleness: int) -> None:
    """The runtime check of invariant 1, on what is about to be trained on.

    `max_staleness` is the setting itself, whatever the batch says of its oldest version. Raises
    `InvariantError`.
    """
    ages = flat.ages[flat.loss_mask]
    if len(ages) and ages.max() > max_staleness:
        token = int(np.flatnonzero(flat.loss_mask & (flat.ages > max_staleness))[0])
        sequence = int(np.searchsorted(flat.offsets, token, side="right")) - 1
        raise InvariantError(
            1,
            f"{int((ages > max_staleness).sum())} unmasked tokens are older than {max_staleness} versions, "
            f"the first in group {flat.group_ids[sequence]} with age {flat.ages[token]}",
        )


def split_groups(flat: FlatBatch, parts: int, seed: int) -> list[NDArray[np.int64]]:
    """The sequences of each mini-batch: whole groups, dealt at random by the seed (groups of neighbouring ids
    began together, and so are of like age and length), as evenly as their number allows; fewer where there
    are fewer groups."""
    group_ids = np.random.default_rng(seed).permutation(np.unique(flat.group_ids))
    return [
        np.flatnonzero(np.isin(flat.group_ids, part))
        for part in np.array_split(group_ids, min(parts, len(group_ids)))
    ]


def count_trained(flat: FlatBatch, sequences: Sequence[int] | NDArray[np.int64]) -> int:
    """Trained tokens of these sequences."""
    return sum(int(flat.loss_mask[flat.offsets[s] : flat.offsets[s + 1]].sum()) for s in sequences)


def _check(group: Group, index: int, trajectory: Trajectory, version: int) -> None:
    """One trajectory's records agree with each other."""
    where = f"group {group.group_id}, trajectory {index}"
    tokens = len(trajectory.token_ids)
    for name in ("loss_mask", "behavior_logprobs"):
        if len(getattr(trajectory, name)) != tokens:
            raise BatchError(
                f"{where}: `{name}` has {len(getattr(trajectory, name))} entries for {tokens} tokens"
            )
    if any(s.start < 0 or s.start + s.length > tokens for s in trajectory.versions):
        raise BatchError(f"{where}: the version spans {trajectory.versions} reach beyond its {tokens} tokens")
    versions = trajectory.token_versions()
    wrong = np.flatnonzero((versions != NOT_SAMPLED) != trajectory.loss_mask)
    if len(wrong):
        raise BatchError(
            f"{where}: `loss_mask` and `versions` disagree on token {wrong[0]} (was it sampled?)"
        )
    if tokens == 0 or trajectory.loss_mask[0]:
        raise BatchError(f"{where}: the first token is a prompt token in every sequence; nothing predicts it")
    if versions.max() > version:
        raise BatchError(
            f"{where}: tokens of version {versions.max()} reached a trainer at version {version}"
        )
    logprobs = trajectory.behavior_logprobs[trajectory.loss_mask]
    if not np.isfinite(logprobs).all():
        raise BatchError(
            f"{where}: a sampled token has the behaviour logprob {logprobs[~np.isfinite(logprobs)][0]}"
        )
    kept = trajectory.kept
    if kept is not None and (problem := kept.problem(trajectory.token_ids)):
        raise BatchError(f"{where}: {problem}")
    if not np.isfinite(trajectory.reward):
        raise BatchError(f"{where}: the reward is {trajectory.reward}; only finite rewards are trained on")
