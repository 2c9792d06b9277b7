"""What a run computes at most, and what that takes of its GPUs at a usual pace. Pure."""

from __future__ import annotations

from asyncrl.config import Config
from asyncrl.runtime.models import KnownModels

USUAL_FLOPS_PER_GPU_S = 4e14
"""Two fifths of an H100's dense bfloat16 peak (989 TFLOP/s): what well-packed training of a few billion
parameters reaches."""
_FORWARD, _BACKWARD = 2, 4
"""Operations a token and parameter (Kaplan et al. 2020, arXiv 2001.08361); attention comes on top."""


def training_flops(config: Config, models: KnownModels, tokens: int) -> float | None:
    """Operations of a training step on so many tokens, over all ranks; None where a model is not known."""
    trained = _FORWARD + _BACKWARD + (_FORWARD if config.trainer.gradient_checkpointing else 0)
    if models.policy is None:
        return None
    per_token = models.policy.parameters * (trained + _FORWARD)  # and the proximal policy's pass
    if config.critic is not None:
        if models.critic is None:
            return None
        per_token += models.critic.parameters * (trained * config.critic.updates_per_policy_step + _FORWARD)
    if config.reference is not None:
        if models.reference is None:
            return None
        per_token += models.reference.parameters * _FORWARD
    return float(per_token) * tokens


def training_hours(config: Config, flops_per_step: float) -> float:
    """Wall-clock hours of all training steps at the usual pace, were nothing else slower."""
    return config.run.steps * flops_per_step / (config.trainer.ranks * USUAL_FLOPS_PER_GPU_S) / 3600
