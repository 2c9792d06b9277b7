"""What the loop knows of a trainer, and the choice of one."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from asyncrl.config import Config
from asyncrl.core.records import Batch

if TYPE_CHECKING:
    from asyncrl.trainer.backends.deepspeed.backend import DeepSpeedTrainer
    from asyncrl.weights.canary import Canary
    from asyncrl.weights.published import PublishedWeights


class Snapshot(Protocol):
    """A trainer's state at the end of a step. No later step changes it. Any thread may use it, beside the
    trainer's own."""

    def write(self, folder: Path) -> None:
        """Write it into an existing folder: `hf`, the policy as `from_pretrained` loads it, and `training`,
        what `restore` needs. Nothing is synced or renamed; until this returns the folder holds anything."""

    def weights_hash(self) -> str:
        """Of the policy's weights, in the model's dtype: equal if and only if they are, bit by bit, whatever
        the backend."""


class Trainer(Protocol):
    """Holds the policy's weights and improves them batch by batch. Not thread-safe."""

    def step(self, batch: Batch, total_steps: int | None = None) -> dict[str, float]:
        """Train on a batch; the step's metrics. `total_steps`: how many the run is expected to have, for the
        learning-rate schedule; by default `run.steps`. Raises `AsyncRLError` for a batch that cannot be
        trained on, `InvariantError` when a token is too old."""

    def weights(self) -> PublishedWeights:
        """What engines are to be given, as it is now, by `state_dict` name. That need not be what is trained.
        These are the live tensors: the next `step` changes them."""

    def canary(self) -> Canary | None:
        """What the weights as they are now make of a fixed sequence; None where nothing is computed."""

    def snapshot(self) -> Snapshot:
        """Copy to host memory what training needs to go on. (Random numbers are a function of the step.)"""

    def restore(self, folder: Path) -> None:
        """Go on, between two steps, from what a snapshot wrote into `folder`: of this or another backend,
        number of ranks and ZeRO stage. Raises `RestoreError` when that is of another model, and changes
        nothing then."""

    def close(self) -> None:
        """The end of a run that went well: other ranks end too."""


def make_trainer(config: Config, rendezvous: Path | None = None) -> Trainer:
    """The trainer that `trainer.backend` names. Loads the model where there is one. `rendezvous`: where its
    ranks find each other, a file that does not exist yet."""
    if config.trainer.backend == "paced":
        from asyncrl.trainer.backends.paced.backend import PacedTrainer

        return PacedTrainer(config)
    if config.trainer.backend == "deepspeed":
        assert rendezvous is not None
        return make_rank(config, 0, rendezvous)
    from asyncrl.trainer.backends.torch.backend import TorchTrainer

    return TorchTrainer(config)


def make_rank(config: Config, rank: int, rendezvous: Path) -> DeepSpeedTrainer:
    """One of the ranks of `trainer.backend=deepspeed`. Returns when all are there."""
    from asyncrl.trainer.models.packed import trainer_device

    os.environ["DS_ACCELERATOR"] = trainer_device(config).type  # DeepSpeed reads it when it is imported
    from asyncrl.trainer.backends.deepspeed.backend import DeepSpeedTrainer

    return DeepSpeedTrainer(config, rank, rendezvous)
