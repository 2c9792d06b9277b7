"""What a run takes of the disk of its directory, estimated from the models' sizes. Pure.

Logs, metrics and the ledger come on top: the groups that are not trained on yet, about 10 bytes a token, and
what was trained on since the oldest checkpoint.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from asyncrl.config import Config
from asyncrl.plan.facts.models import KnownModels
from asyncrl.plan.memory.trainer import snapshot_bytes
from asyncrl.trainer.backend import backend_of


@dataclass(frozen=True, slots=True)
class Disk:
    """Checkpoints, when they are most."""

    checkpoints: int
    checkpoint_bytes: int
    """Of each."""

    @property
    def total_bytes(self) -> int:
        return self.checkpoints * self.checkpoint_bytes


def estimate_disk(config: Config, models: KnownModels) -> Disk | None:
    """None where a trained model's size is not known."""
    if not backend_of(config).computes:
        return Disk(0, 0)
    if models.policy is None or (config.critic is not None and models.critic is None):
        return None
    return Disk(_checkpoints(config), snapshot_bytes(config, models, models.policy))


def _checkpoints(config: Config) -> int:
    """Those that are kept, and the next, which is written before the oldest goes; no more than are made."""
    every, kept = config.checkpoint.every_steps, config.checkpoint.keep_last + config.checkpoint.keep_best
    if every is None:
        most = 1 if config.run.in_one_process else config.run.steps
    else:
        most = math.ceil(config.run.steps / every) if every else 1
    return min(kept + 1, most)
