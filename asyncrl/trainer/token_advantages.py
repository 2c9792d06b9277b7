"""Advantages that differ from token to token: by the critic's values, by turns, by how uncertain the tokens
were, or since each token has rewards of its own."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from asyncrl.config import ObjectiveConfig
from asyncrl.objective.catalogue import ADVANTAGES, STEP_ADVANTAGES, TURN_ADVANTAGES
from asyncrl.objective.gae import Steps, gae, whiten
from asyncrl.objective.policy import ratio
from asyncrl.trainer.packing.batch import FlatBatch, TokenBatch

Estimate = Callable[..., Any]
"""The function of `objective` with its settings."""
ByToken = Callable[[FlatBatch, TokenBatch, Tensor | None], tuple[Tensor, Tensor | None]]
"""As `AdvantageEstimator.__call__`."""


def by_token(config: ObjectiveConfig, estimate: Estimate) -> ByToken:
    """estimate: what `objective.advantage` names, one of `OF_TOKENS`."""
    name = config.advantage
    if name in TURN_ADVANTAGES:
        from asyncrl.trainer.turns import by_turn  # of episodes

        how: ByToken = partial(by_turn, estimate)
    elif name in STEP_ADVANTAGES:
        how = partial(_from_norms, estimate)
    else:
        how = partial(_from_values, estimate, ADVANTAGES[name].needs_ratios)
    return partial(_whitened, how) if config.whiten else how


def whitened_to_go(rewards: Tensor, flat: FlatBatch, tokens: TokenBatch, token_rewards: Tensor) -> Tensor:
    """float32[T]: what follows each token, whitened: an earlier token's penalty is no fault of it. rewards:
    float[M], of each member."""
    if flat.members is not None:
        rewards = rewards[torch.from_numpy(flat.members)]
    zeros = torch.zeros_like(token_rewards)
    steps = Steps(zeros, rewards.to(zeros.device), tokens.sequences, tokens.mask, token_rewards)
    return whiten(gae(steps)[0], tokens.mask)


def _whitened(
    how: ByToken, flat: FlatBatch, tokens: TokenBatch, token_rewards: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    advantages, targets = how(flat, tokens, token_rewards)
    return whiten(advantages, tokens.mask), targets


def _from_values(
    estimate: Estimate,
    needs_ratios: bool,
    flat: FlatBatch,
    tokens: TokenBatch,
    token_rewards: Tensor | None,
) -> tuple[Tensor, Tensor]:
    inputs = [_steps(flat, tokens, tokens.values, token_rewards)]
    if needs_ratios:
        inputs.append(ratio(tokens.start_logprobs, tokens.behavior_logprobs, tokens.mask))
    return estimate(*inputs)


def _from_norms(
    estimate: Estimate, flat: FlatBatch, tokens: TokenBatch, token_rewards: Tensor | None
) -> tuple[Tensor, None]:
    norms = tokens.score_norms
    group_ids = torch.from_numpy(flat.group_ids).to(tokens.ids.device)
    return estimate(_steps(flat, tokens, norms, token_rewards), norms, group_ids), None


def _steps(flat: FlatBatch, tokens: TokenBatch, values: Tensor | None, token_rewards: Tensor | None) -> Steps:
    rewards = torch.from_numpy(flat.rewards).to(tokens.ids.device)
    if flat.turn_rewards is not None:
        of_turns = torch.from_numpy(flat.turn_rewards).to(rewards.device)
        rewards = torch.zeros_like(rewards)
        token_rewards = of_turns if token_rewards is None else token_rewards + of_turns
    return Steps(values, rewards, tokens.sequences, tokens.mask, token_rewards)
