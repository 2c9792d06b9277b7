"""One rank, in plain torch."""

from __future__ import annotations

from pathlib import Path

from asyncrl.config import Config
from asyncrl.trainer.backend import BackendSpec, Trainer


class Torch(BackendSpec):
    offloads = True

    def make(self, config: Config, rendezvous: Path | None) -> Trainer:
        if config.placement.in_turns:
            from asyncrl.trainer.backends.torch.offload import OffloadingTrainer

            return OffloadingTrainer(config)
        from asyncrl.trainer.backends.torch.backend import TorchTrainer

        return TorchTrainer(config)


SPEC = Torch()
