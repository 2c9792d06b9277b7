"""A leased group, with all that a worker needs to carry it out."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from asyncrl.bounded import Count
from asyncrl.config import RolloutConfig
from asyncrl.core.kept import MOST_LISTED
from asyncrl.core.records import Lease, Purpose
from asyncrl.data.prompts import Prompt
from asyncrl.rollout.engines.base import SamplingParams


@dataclass(frozen=True, slots=True)
class RolloutTask:
    lease_id: int
    group_id: int
    attempt: int
    """Attempts before this one; a new attempt samples anew."""
    row: int
    """Index of the prompt in the dataset."""
    prompt: str | list[dict[str, Any]]
    prompt_ids: list[int]
    columns: dict[str, Any]
    """The row's other columns, for the reward functions."""
    group_size: Count
    """Responses that are wanted."""
    sampling: SamplingParams
    """Of each request, which has a seed of its own."""
    purpose: Purpose = Purpose.TRAIN
    trained_ids: list[int] | None = None
    """The prompt that it is trained on with, where that is another one."""
    prefix_tokens: Count = 0
    """At the end of `prompt_ids`: what every response begins with."""
    hint_of: int | None = None
    """The row that this is, with a hint."""
    version: Count = 0
    """Weights that are older may sample none of it."""

    @staticmethod
    def of(
        lease: Lease,
        prompt: Prompt,
        group_size: int,
        sampling: SamplingParams,
        purpose: Purpose = Purpose.TRAIN,
    ) -> RolloutTask:
        """A lease with its prompt. What a response begins with is a part of its length."""
        prefix = [] if prompt.prefix_ids is None else prompt.prefix_ids.tolist()
        if prefix:
            sampling = replace(sampling, max_new_tokens=sampling.max_new_tokens - len(prefix))
        return RolloutTask(
            *(lease.lease_id, lease.group_id, lease.attempt, prompt.index),
            *(prompt.prompt, prompt.prompt_ids.tolist() + prefix, prompt.columns, group_size),
            *(sampling, purpose),
            None if prompt.trained_ids is None else prompt.trained_ids.tolist(),
            *(len(prefix), prompt.hint_of, lease.version),
        )


def sampling_of(config: RolloutConfig) -> SamplingParams:
    """How the run samples what it trains on."""
    return SamplingParams(
        max_new_tokens=config.max_new_tokens,
        temperature=config.temperature,
        top_p=config.top_p,
        top_k=config.top_k or (MOST_LISTED if config.top_p < 1 else 0),
        stop_token_ids=tuple(config.stop_token_ids),
        min_new_tokens=config.min_new_tokens,
    )
