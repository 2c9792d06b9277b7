"""A model and its optimizer under a DeepSpeed engine."""

from __future__ import annotations

import math
from typing import Any

import deepspeed
from torch import Tensor, nn

from asyncrl.config import Config
from asyncrl.trainer.deepspeed.settings import engine_settings
from asyncrl.trainer.optimizer import NonFiniteGradientError, SkipCounter, Update, adamw
from asyncrl.trainer.packing import MicroBatch


class DeepSpeedLearner:
    """`Learner` whose gradients, optimizer state and weights are shared out by
    `trainer.deepspeed.zero_stage`."""

    def __init__(self, model: nn.Module, config: Config) -> None:
        parameters = [p for p in model.parameters() if p.requires_grad]
        self._engine, *_ = deepspeed.initialize(
            model=model,
            optimizer=adamw(parameters, config.trainer),
            config=engine_settings(config),
            dist_init_required=False,
        )
        self._skips = SkipCounter()

    def __call__(self, micro: MicroBatch, *inputs: Tensor) -> Any:
        return self._engine(micro, *inputs)

    def backward(self, loss: Tensor) -> None:
        # DeepSpeed takes the mean over the ranks, and the shares are to add up.
        self._engine.backward(loss * self._engine.dp_world_size)

    def update(self, lr: float, training_step: int) -> Update:
        for group in self._engine.optimizer.param_groups:
            group["lr"] = lr
        self._engine.step()
        grad_norm = float(self._engine.get_global_grad_norm())
        applied = self._engine.was_step_applied()
        if applied and not math.isfinite(grad_norm):
            raise NonFiniteGradientError(
                f"training step {training_step}: the gradient norm is {grad_norm}, and DeepSpeed has applied "
                "the update (in float32 it does not check); the run ends before these weights are published; "
                "lower the learning rate, or set model.dtype=bfloat16"
            )
        self._skips.count(applied, grad_norm, training_step)
        return Update(grad_norm, applied)
