"""Models with their optimizer, AdamW over float32 master weights, on this rank."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from asyncrl.config import TrainerConfig
from asyncrl.errors import RunFailed
from asyncrl.states import doing
from asyncrl.trainer.packing.pack import MicroBatch
from asyncrl.trainer.ranks import Ranks
from asyncrl.trainer.state import AVERAGES, STEP, WEIGHT, SavedPart, Shapes, Stateful

MAX_SKIPPED_UPDATES = 3
"""So many updates in a row without a finite gradient end the run; fewer are skipped and counted."""


class NonFiniteGradientError(RunFailed):
    """Several gradients in a row were not finite: the run has diverged."""


@dataclass(frozen=True, slots=True)
class Update:
    """What became of an update. grad_norm: global norm before clipping. Not `applied` when that is not
    finite."""

    grad_norm: float
    applied: bool


class Learner(Stateful, Protocol):
    """Forward, backward and update of one model. Where there are several ranks, all call all three alike."""

    def __call__(self, micro: MicroBatch, *inputs: Tensor) -> Any:
        """What the model makes of a micro-batch."""

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of this rank's share of the loss; the shares of all ranks add up."""

    def update(self, lr: float, training_step: int) -> Update:
        """Clip the gradients added since the last update, over all ranks, to `trainer.max_grad_norm`, update
        the weights, forget the gradients. Raises `NonFiniteGradientError` at the `MAX_SKIPPED_UPDATES`-th
        skip in a row."""


class SkipCounter:
    """Counts updates in a row that were skipped since their gradient was not finite."""

    def __init__(self) -> None:
        self.in_a_row = 0

    def count(self, applied: bool, grad_norm: float, training_step: int) -> None:
        """Raises `NonFiniteGradientError` at the `MAX_SKIPPED_UPDATES`-th skip in a row."""
        self.in_a_row = 0 if applied else self.in_a_row + 1
        if self.in_a_row >= MAX_SKIPPED_UPDATES:
            raise NonFiniteGradientError(
                f"training step {training_step}: the gradient norm is {grad_norm}, and {self.in_a_row} "
                "updates in a row had to be skipped (the weights are those before them); lower trainer.lr, "
                "or set model.dtype=float32"
            )


def adamw(parameters: Sequence[Tensor], config: TrainerConfig) -> torch.optim.AdamW:
    """torch's AdamW over these. Weight decay spares vectors (norms, biases)."""
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=config.lr,
        betas=config.betas,
        eps=config.eps,
        fused=True,
    )


def adamw_start(weight: Tensor) -> dict[str, Tensor]:
    """The state with which torch's (fused) AdamW begins its first update of `weight`."""
    zeros = {kind: torch.zeros_like(weight) for kind in AVERAGES}
    return {**zeros, STEP: torch.zeros((), dtype=torch.float32, device=weight.device)}


class TorchLearner:
    """Plain torch: each rank has all of the model and the optimizer's state, and the gradients are summed.

    State, weights and gradient sums are float32 whatever the model's dtype. Small updates vanish in bfloat16
    (8 bits of mantissa), so a bfloat16 model gets a float32 master copy: each backward pass adds its
    gradients to the master's as they appear, and an update is copied back. A float32 model is its own master.
    """

    def __init__(self, model: nn.Module, config: TrainerConfig, ranks: Ranks | None = None) -> None:
        self._model = model
        self._ranks = ranks
        self._max_grad_norm = config.max_grad_norm
        self._skips = SkipCounter()
        self._parameters = trained_parameters(model)
        self._masters: dict[str, Tensor] = {}
        for name, parameter in self._parameters.items():
            master: Tensor = parameter
            if parameter.dtype != torch.float32:
                master = parameter.detach().float()
                parameter.register_post_accumulate_grad_hook(_AddTo(master))
            self._masters[name] = master
        self._adamw = adamw(list(self._masters.values()), config)

    def __call__(self, micro: MicroBatch, *inputs: Tensor) -> Any:
        return self._model(micro, *inputs)

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    @doing("optimizer")
    @torch.no_grad()
    def update(self, lr: float, training_step: int) -> Update:
        masters = [master for master in self._masters.values() if master.grad is not None]
        if self._ranks is not None:
            for master in masters:
                self._ranks.sum(master.grad)
        norm = nn.utils.clip_grad_norm_(masters, self._max_grad_norm)
        grad_norm = float(norm)
        applied = bool(torch.isfinite(norm))
        self._skips.count(applied, grad_norm, training_step)
        if applied:
            for group in self._adamw.param_groups:
                group["lr"] = lr
            self._adamw.step()
            for name, parameter in self._parameters.items():
                if parameter is not self._masters[name]:
                    parameter.copy_(self._masters[name])
        self._adamw.zero_grad(set_to_none=True)
        return Update(grad_norm, applied)

    @property
    def count(self) -> int:
        return self._skips.in_a_row

    def shapes(self) -> Shapes:
        return learner_shapes(self._parameters)

    def tensors(self) -> Iterator[tuple[str, str, Tensor]]:
        """The live ones; before a parameter's first update, what AdamW would begin with."""
        for name, master in self._masters.items():
            yield WEIGHT, name, master.detach()
            for kind, tensor in (self._adamw.state.get(master) or adamw_start(master)).items():
                yield kind, name, tensor

    @torch.no_grad()
    def load(self, saved: SavedPart) -> None:
        for name, parameter in self._parameters.items():
            master = self._masters[name]
            master.copy_(saved(WEIGHT, name))
            if parameter is not master:
                parameter.copy_(master)
            self._adamw.state[master] = {
                kind: saved(kind, name).to(master.device, copy=True)  # what was read may be the mapped file
                for kind in (*AVERAGES, STEP)
            }
        self._skips.in_a_row = saved.count


class _AddTo:
    """Autograd hook that moves a parameter's gradient, once it is complete, into its master's float32 sum."""

    def __init__(self, master: Tensor) -> None:
        self._master = master

    def __call__(self, parameter: Tensor) -> None:
        assert parameter.grad is not None  # the hook runs right after it was accumulated
        if self._master.grad is None:
            self._master.grad = parameter.grad.float()
        else:
            self._master.grad += parameter.grad
        parameter.grad = None


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """By the names that the decoder inside `model` gives them, tied ones once."""
    return {
        name.removeprefix("model."): parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


def learner_shapes(parameters: Mapping[str, nn.Parameter]) -> Shapes:
    """A learner's tensors, while its parameters are still whole."""
    whole = {name: tuple(parameter.shape) for name, parameter in parameters.items()}
    return {**dict.fromkeys((WEIGHT, *AVERAGES), whole), STEP: dict.fromkeys(whole, ())}
