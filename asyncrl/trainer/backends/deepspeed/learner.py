"""A model and its optimizer under a DeepSpeed engine."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import deepspeed
import torch
from deepspeed.runtime.zero import register_external_parameter
from deepspeed.runtime.zero.offload_config import OffloadStateTypeEnum
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state
from torch import Tensor, nn

from asyncrl.config import Config
from asyncrl.states import doing
from asyncrl.trainer.backends.deepspeed.engine_settings import engine_settings
from asyncrl.trainer.backends.deepspeed.extensions import wait_for_compilers
from asyncrl.trainer.backends.deepspeed.pieces import (
    ScatteredPieces,
    gathered,
    optimizer_states,
    set_whole,
)
from asyncrl.trainer.learner import (
    NonFiniteGradientError,
    SkipCounter,
    Update,
    adamw,
    learner_shapes,
    trained_parameters,
)
from asyncrl.trainer.offload import Parking
from asyncrl.trainer.packing.pack import MicroBatch
from asyncrl.trainer.state import AVERAGES, STEP, WEIGHT, SavedPart, Shapes
from asyncrl.work import unhurried

if TYPE_CHECKING:
    from asyncrl.trainer.lora.adapter import Adapter


_MOVED_BY_ZERO_3 = (
    OffloadStateTypeEnum.lp_params,
    OffloadStateTypeEnum.lp_grads,
    OffloadStateTypeEnum.contiguous_grad_buffer,
)


def _without_extensions_for_inference() -> None:
    """When DeepSpeed joins ranks on a CPU, it loads sums over ranks that only the tensor-parallel layers of
    its inference call, and compiles them for half a minute on a machine's first start. Where it knows of no
    extension that is possible, it does neither."""
    deepspeed.ops.__compatible_ops__ = {}


class DeepSpeedLearner:
    """`Learner` whose gradients, optimizer state and weights are shared out by
    `trainer.deepspeed.zero_stage`."""

    def __init__(self, model: nn.Module, config: Config) -> None:
        self._parameters = trained_parameters(model)
        self._shapes = learner_shapes(self._parameters)
        self._parking = Parking()
        settings = engine_settings(config)
        if config.trainer.deepspeed.zero_stage == 2:
            self._hold_large_gradients(settings["zero_optimization"]["reduce_bucket_size"])
        wait_for_compilers()
        _without_extensions_for_inference()
        with unhurried("starting DeepSpeed"):
            self._engine, *_ = deepspeed.initialize(
                model=model,
                optimizer=adamw(list(self._parameters.values()), config.trainer),
                config=settings,
                dist_init_required=False,
            )
        self._skips = SkipCounter()

    def _hold_large_gradients(self, bucket_elements: int) -> None:
        """ZeRO 2 sums a gradient that is larger than a bucket in place, on a stream of its own, and lets go
        of it at once: its memory must not be used anew before that stream is done. Hooks run in the order of
        their registration, so this comes before DeepSpeed's own."""

        def hold(parameter: Tensor) -> None:
            stream = self._engine.optimizer.reduction_stream
            if stream is not None:  # as on a CPU
                assert parameter.grad is not None
                parameter.grad.record_stream(stream)

        for parameter in self._parameters.values():
            if parameter.numel() > bucket_elements:
                parameter.register_post_accumulate_grad_hook(hold)

    def share_out(self, adapter: Adapter) -> None:
        """The adapter that is what this trains: the ranks share its model's weights, too (ZeRO 3)."""
        for layer in adapter.layers.values():
            for parameter in layer.lora[:2]:  # which the layer computes with, and another module has
                register_external_parameter(layer, parameter)
        adapter.share_out(ScatteredPieces(self._engine.optimizer))

    def __call__(self, micro: MicroBatch, *inputs: Tensor) -> Any:
        return self._engine(micro, *inputs)

    def backward(self, loss: Tensor) -> None:
        # The shares are to add up, and ZeRO 3 takes the mean over the ranks.
        self._engine.backward(loss * self._engine.dp_world_size if self._engine.gradient_average else loss)

    @doing("optimizer")
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

    @property
    def count(self) -> int:
        return self._skips.in_a_row

    def shapes(self) -> Shapes:
        return self._shapes

    def tensors(self) -> Iterator[tuple[str, str, Tensor]]:
        states = optimizer_states(self._engine.optimizer)
        for name, parameter in self._parameters.items():
            yield WEIGHT, name, safe_get_full_fp32_param(parameter)
            for kind in AVERAGES:
                yield kind, name, safe_get_full_optimizer_state(parameter, kind)
            yield STEP, name, states[0][STEP]

    def offload(self) -> None:
        has_pinned = self._engine.device.type == "cuda"
        if self._engine.zero_optimization_stage() < 3:
            self._engine.offload_states(pin_memory=has_pinned)
            return
        self._engine.offload_states(_MOVED_BY_ZERO_3, pin_memory=has_pinned)
        self._parking.put(self._masters())

    def reload(self) -> None:
        self._engine.reload_states()
        self._parking.bring_back()

    def _masters(self) -> Iterator[Tensor]:
        """This rank's partitions and AdamW's state of them, which ZeRO 3 itself moves for its own AdamW
        only."""
        yield from self._engine.optimizer.fp32_partitioned_groups_flat
        for state in optimizer_states(self._engine.optimizer):
            yield from state.values()

    @torch.no_grad()
    def load(self, saved: SavedPart) -> None:
        """AdamW counts the updates of all the parameters of a partition together: of those that a mixture of
        experts has not always used, it counts more than plain torch does."""
        states = optimizer_states(self._engine.optimizer)
        for name, parameter in self._parameters.items():
            weight = saved(WEIGHT, name)
            set_whole(parameter, weight)
            for kind in AVERAGES:
                set_whole(parameter, saved(kind, name), kind)
            with gathered([parameter], modified=True):
                parameter.copy_(weight)
        updates = max(float(saved(STEP, name)) for name in self._parameters)
        for state in states:
            state[STEP].fill_(updates)
        self._skips.in_a_row = saved.count
