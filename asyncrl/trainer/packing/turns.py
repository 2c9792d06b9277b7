"""What a batch holds of the turns of episodes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from asyncrl.core.records import Trajectory


def turn_arrays(trajectories: Sequence[Trajectory], bootstrapped: NDArray[np.bool_]) -> dict[str, Any]:
    """The fields of a `FlatBatch` that tell of turns. bootstrapped: bool[S], those at whose end a value takes
    the place of their reward."""
    return {"turn_rewards": turn_rewards(trajectories, bootstrapped), "turns": turn_numbers(trajectories)}


def turn_numbers(trajectories: Sequence[Trajectory]) -> NDArray[np.int64] | None:
    """As `FlatBatch.turns`."""
    if not any(t.turns for t in trajectories):
        return None
    arrays = [np.zeros(len(t.token_ids), np.int64) for t in trajectories]
    for array, trajectory in zip(arrays, trajectories, strict=True):
        for number, last in reversed(trajectory.turns):
            array[: last + 1] = number
    return np.concatenate(arrays)


def turn_rewards(
    trajectories: Sequence[Trajectory], bootstrapped: NDArray[np.bool_]
) -> NDArray[np.float32] | None:
    """As `FlatBatch.turn_rewards`. bootstrapped: as of `turn_arrays`."""
    if not any(t.turn_rewards for t in trajectories):
        return None
    arrays = [np.zeros(len(t.token_ids), np.float32) for t in trajectories]
    for array, trajectory, is_open in zip(arrays, trajectories, bootstrapped, strict=True):
        last = int(np.flatnonzero(trajectory.loss_mask)[-1])
        for at, reward in trajectory.turn_rewards or [(last, 0.0 if is_open else trajectory.reward)]:
            array[at] += reward
    return np.concatenate(arrays)
