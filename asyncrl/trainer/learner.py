"""A model with its optimizer, on this rank."""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor, nn

from asyncrl.config import TrainerConfig
from asyncrl.trainer.optimizer import MasterAdamW, Update
from asyncrl.trainer.packing import MicroBatch
from asyncrl.trainer.ranks import Ranks


class Learner(Protocol):
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
        self._optimizer = MasterAdamW(model.parameters(), config, ranks)

    def __call__(self, micro: MicroBatch, *inputs: Tensor) -> Any:
        return self._model(micro, *inputs)

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def update(self, lr: float, training_step: int) -> Update:
        return self._optimizer.step(lr, training_step)
