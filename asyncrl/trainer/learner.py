"""A model with its optimizer, on this rank."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Protocol

from torch import Tensor, nn

from asyncrl.config import TrainerConfig
from asyncrl.trainer.optimizer import MasterAdamW, Update
from asyncrl.trainer.packing.pack import MicroBatch
from asyncrl.trainer.ranks import Ranks
from asyncrl.trainer.state import AVERAGES, STEP, WEIGHT, SavedPart, Shapes, Stateful


class Learner(Stateful, Protocol):
    """Forward, backward and update of one model. Where there are several ranks, all call all three alike."""

    def __call__(self, micro: MicroBatch, *inputs: Tensor) -> Any:
        """What the model makes of a micro-batch."""

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of this rank's share of the loss; the shares of all ranks add up."""

    def update(self, lr: float, training_step: int) -> Update:
        """Update the weights by the gradients added since the last update, and forget those."""


class TorchLearner:
    """Plain torch: each rank has all of the model and the optimizer's state, and the gradients are summed."""

    def __init__(self, model: nn.Module, config: TrainerConfig, ranks: Ranks | None = None) -> None:
        self._model = model
        self._parameters = trained_parameters(model)
        self._optimizer = MasterAdamW(self._parameters.values(), config, ranks)

    def __call__(self, micro: MicroBatch, *inputs: Tensor) -> Any:
        return self._model(micro, *inputs)

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def update(self, lr: float, training_step: int) -> Update:
        return self._optimizer.step(lr, training_step)

    @property
    def count(self) -> int:
        return self._optimizer.skips.in_a_row

    def shapes(self) -> Shapes:
        return learner_shapes(self._parameters)

    def tensors(self) -> Iterator[tuple[str, str, Tensor]]:
        for name, parameter in self._parameters.items():
            for kind, tensor in self._optimizer.state(parameter).items():
                yield kind, name, tensor

    def load(self, saved: SavedPart) -> None:
        for name, parameter in self._parameters.items():
            self._optimizer.load(parameter, {kind: saved(kind, name) for kind in (WEIGHT, *AVERAGES, STEP)})
        self._optimizer.skips.in_a_row = saved.count


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
