"""From a batch to its turns, and from their advantages to those of tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from asyncrl.objective.gae import Steps, gae
from asyncrl.objective.turns import Turns
from asyncrl.trainer.packing.batch import FlatBatch, TokenBatch


def by_turn(
    estimate: Callable[[Turns], Any], flat: FlatBatch, tokens: TokenBatch, token_rewards: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """(advantages, targets for the critic), float32[T] each, of what `estimate` makes of the batch's turns;
    None where it gives no targets. token_rewards: float32[T], further rewards, which count for their
    turns."""
    turns, at, of_token = turns_of(flat, tokens.values, token_rewards)
    estimated = estimate(turns)

    def spread(of_turns: Tensor) -> Tensor:
        out = torch.zeros(len(flat.token_ids))
        out[at] = of_turns.float()[of_token]
        return out.to(tokens.ids.device)

    if isinstance(estimated, Tensor):
        return spread(estimated), None
    advantages, targets = estimated
    return spread(advantages), spread(targets)


def turns_of(
    flat: FlatBatch, values: Tensor | None, token_rewards: Tensor | None
) -> tuple[Turns, Tensor, Tensor]:
    """The turns that are trained on; where the batch's trained tokens are (int64[N]), and the turn of each
    (int64[N]). values: float[T], V before each token. The turns are in host memory, in float64."""
    at = np.flatnonzero(flat.loss_mask)
    sequences = np.repeat(np.arange(flat.sequences), np.diff(flat.offsets))[at]
    members = sequences if flat.members is None else flat.members[sequences]
    numbers = np.zeros_like(members) if flat.turns is None else flat.turns[at]
    keys, firsts, of_token = np.unique([members, numbers], axis=1, return_index=True, return_inverse=True)
    of_token = torch.from_numpy(of_token.reshape(-1))
    members, numbers = map(torch.from_numpy, keys)

    def sums(of_tokens: Tensor) -> Tensor:
        return torch.zeros(len(firsts), dtype=torch.float64).index_add(0, of_token, of_tokens)

    # Each segment has what was earned from its first turn on. What a turn has earned until the member's next
    # one, in whichever segment, is the difference.
    rewards = torch.from_numpy(flat.rewards)
    given = None if flat.turn_rewards is None else torch.from_numpy(flat.turn_rewards).double()
    if given is not None:
        rewards = torch.zeros_like(rewards)
    mask, index = torch.from_numpy(flat.loss_mask), flat.sequence_index()
    to_go = gae(Steps(torch.zeros(len(mask), dtype=torch.float64), rewards, index, mask, given))[0][
        at[firsts]
    ]
    goes_on = torch.cat([members[1:] == members[:-1], torch.zeros(1, dtype=torch.bool)])
    earned = to_go - torch.where(goes_on, to_go.roll(-1), 0.0)
    if token_rewards is not None:
        earned = earned + sums(token_rewards.double().cpu()[at])
    turns = Turns(
        earned,
        members,
        torch.from_numpy(flat.group_ids[sequences[firsts]]),
        numbers,
        sums(torch.ones(len(at), dtype=torch.float64)).long(),
        None if values is None else values.double().cpu()[at[firsts]],
    )
    return turns, torch.from_numpy(at), of_token


def values_at_ends(
    flat: FlatBatch, values: NDArray[np.float64], cut: NDArray[np.bool_]
) -> NDArray[np.float32]:
    """`flat.turn_rewards` with the values (float64[S]) of what was `cut` off (bool[S]) at the last trained
    token of each; what earlier turns have earned stays."""
    assert flat.turn_rewards is not None
    of_turns = flat.turn_rewards.copy()
    for s in np.flatnonzero(cut):
        trained = np.flatnonzero(flat.loss_mask[flat.offsets[s] : flat.offsets[s + 1]])
        of_turns[flat.offsets[s] + trained[-1:]] += values[s]
    return of_turns
