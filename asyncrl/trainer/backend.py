"""What the loop knows of a trainer, and the choice of one."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from asyncrl.config import Config
from asyncrl.core.records import Batch

if TYPE_CHECKING:
    from asyncrl.trainer.deepspeed.backend import DeepSpeedTrainer
    from asyncrl.weights.canary import Canary
    from asyncrl.weights.live import LiveWeights


class Trainer(Protocol):
    """Holds the policy's weights and improves them batch by batch. Not thread-safe."""

    def step(self, batch: Batch, total_steps: int | None = None) -> dict[str, float]:
        """Train on a batch; the step's metrics. `total_steps`: how many the run is expected to have, for the
        learning-rate schedule; by default `run.steps`. Raises `AsyncRLError` for a batch that cannot be
        trained on, `InvariantError` when a token is too old."""

    def weights(self) -> LiveWeights:
        """The weights as they are now, by `state_dict` name, tied tensors once under their first name. These
        are the live tensors: the next `step` changes them."""

    def canary(self) -> Canary | None:
        """What the weights as they are now make of a fixed sequence; None where nothing is computed."""

    def save(self, path: Path) -> None:
        """Write the policy as a folder; whole or not at all."""

    def close(self) -> None:
        """The end of a run that went well: other ranks end too."""


def make_trainer(config: Config, rendezvous: Path | None = None) -> Trainer:
    """The trainer that `trainer.backend` names. Loads the model where there is one. `rendezvous`: where its
    ranks find each other, a file that does not exist yet."""
    if config.trainer.backend == "paced":
        from asyncrl.trainer.paced import PacedTrainer

        return PacedTrainer(config)
    if config.trainer.backend == "deepspeed":
        assert rendezvous is not None
        return make_rank(config, 0, rendezvous)
    from asyncrl.trainer.torch_backend import TorchTrainer

    return TorchTrainer(config)


def make_rank(config: Config, rank: int, rendezvous: Path) -> DeepSpeedTrainer:
    """One of the ranks of `trainer.backend=deepspeed`. Returns when all are there."""
    from asyncrl.trainer.packed import trainer_device

    os.environ["DS_ACCELERATOR"] = trainer_device(config).type  # DeepSpeed reads it when it is imported
    from asyncrl.trainer.deepspeed.backend import DeepSpeedTrainer

    return DeepSpeedTrainer(config, rank, rendezvous)
