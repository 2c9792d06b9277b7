"""The trainer in plain torch where it takes turns with the engines (`placement.colocate: turns`)."""

from __future__ import annotations

from asyncrl.trainer.backends.torch.backend import TorchTrainer
from asyncrl.trainer.offload import MovableLearner, offload, reload


class OffloadingTrainer(TorchTrainer):
    learner = MovableLearner

    def offload(self) -> None:
        offload(self._parts)

    def reload(self) -> None:
        reload(self._parts)
