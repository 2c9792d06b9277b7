"""Advantages of trajectories, from their rewards."""

from __future__ import annotations

import torch
from torch import Tensor

CONSTANT_STD = 1e-6
"""A group whose standard deviation is at most this, relative to max(1, largest |reward|), is constant: what
is left is float noise, and dividing by it would make huge advantages out of nothing."""


def grpo(rewards: Tensor, group_ids: Tensor, scale_by_std: bool = True) -> Tensor:
    """Group-relative advantages: A_i = (r_i - mean of i's group) / standard deviation of i's group.

    rewards: float[S], one a trajectory. group_ids: int[S], which group each belongs to, in any order and any
    group sizes. Returns float[S] of the rewards' dtype; constant groups (groups of one included) are exactly
    0, and with `scale_by_std` no |A_i| exceeds sqrt(group size - 1), since the deviation is the
    population's.

    Source: GRPO, Shao et al. 2024 (arXiv 2402.03300); without the deviation ("Dr. GRPO"):
    Liu et al. 2025 (arXiv 2503.20783). Raises `ValueError` for rewards that are not finite.
    """
    if rewards.shape != group_ids.shape or rewards.ndim != 1:
        raise ValueError(f"expected rewards[S] and group_ids[S], got {rewards.shape} and {group_ids.shape}")
    if not torch.isfinite(rewards).all():
        bad = int((~torch.isfinite(rewards)).nonzero()[0])
        raise ValueError(
            f"the reward of trajectory {bad} (group {int(group_ids[bad])}) is {float(rewards[bad])}; "
            "only finite rewards can be compared"
        )
    sizes, group = _groups(group_ids)
    magnitude = torch.ones(len(sizes), dtype=torch.float64, device=rewards.device)
    magnitude = magnitude.scatter_reduce(0, group, rewards.double().abs(), "amax")[group]
    relative = rewards.double() / magnitude
    centred = relative - _group_mean(relative, group, sizes)
    std = _group_mean(centred.square(), group, sizes).sqrt()
    advantages = centred / std.clamp(min=CONSTANT_STD) if scale_by_std else centred * magnitude
    return torch.where(std > CONSTANT_STD, advantages, 0.0).to(rewards.dtype)


def _groups(group_ids: Tensor) -> tuple[Tensor, Tensor]:
    """Size of each group [K], and the dense index 0..K-1 of each trajectory's group [S]."""
    _, group, sizes = torch.unique(group_ids, return_inverse=True, return_counts=True)
    return sizes, group


def _group_mean(values: Tensor, group: Tensor, sizes: Tensor) -> Tensor:
    """The mean over its group, for each trajectory [S]."""
    sums = torch.zeros(len(sizes), dtype=values.dtype, device=values.device).index_add(0, group, values)
    return (sums / sizes)[group]
