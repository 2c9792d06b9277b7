"""What a run takes of its directory's disk and of shared memory, and whether it finds them. Each check raises
a `ConfigError` that names key, value and remedy.

Logs, metrics and the ledger come on top of the estimate: the groups that are not trained on yet, about 10
bytes a token, and what was trained on since the oldest checkpoint.
"""

from __future__ import annotations

import math
import os
import tempfile
from dataclasses import dataclass

from asyncrl.config import Config
from asyncrl.decoders.facts import ModelFacts
from asyncrl.errors import ConfigError, NotHereError
from asyncrl.paths import check_can_be_written, user_path
from asyncrl.plan.facts.models import KnownModels
from asyncrl.plan.machine import Machine
from asyncrl.plan.memory.estimate import shared_weights_bytes
from asyncrl.plan.memory.trainer import snapshot_bytes
from asyncrl.runfiles.layout import RunDir
from asyncrl.runfiles.resume import check_settings
from asyncrl.trainer.backend import backend_of
from asyncrl.units import format_bytes
from asyncrl.weights.shm.segment import shared_folder
from asyncrl.weights.transport import TRANSPORTS

_RUN_FILES = ("config.yaml", "metrics.jsonl", "ledger.db")
"""Files whose presence shows that a folder holds a run."""


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
    if every is None or config.checkpoint.best_of is not None:
        most = 1 if config.run.in_one_process and every is None else config.run.steps
    else:
        most = math.ceil(config.run.steps / every) if every else 1
    return min(kept + 1, most)


def run_dir(config: Config) -> bool:
    """The run directory can be made, and holds no run yet, or one that this config may go on with: then
    True."""
    key, value = ("run.root", config.run.root) if config.run.dir is None else ("run.dir", config.run.dir)
    path = user_path(value, f"{key}={value}")
    held = [name for name in _RUN_FILES if (path / name).exists()]
    if key == "run.dir" and held:
        if config.run.resume == "never":
            raise ConfigError(
                f"{key}={value}: this folder already holds a run ({', '.join(held)}); go on with it by "
                f"`asyncrl-launch --resume {value}`, or name another one"
            )
        if RunDir(path).prompts.exists() and "config.yaml" in held:
            check_settings(config, RunDir(path))
            check_can_be_written(path, f"{key}={value}")
            return True
        if held != ["config.yaml"]:
            raise ConfigError(
                f"{key}={value}: this folder holds part of a run ({', '.join(held)}), and no run can go on "
                "without config.yaml and prompts.msgpack; put them back, or name another folder"
            )
    check_can_be_written(path, f"{key}={value}")
    return False


def temporary_folder() -> bool:
    """Temporary files find a folder: then True."""
    try:
        return bool(tempfile.gettempdir())
    except FileNotFoundError as error:
        raise ConfigError(
            f"there is no folder for temporary files ({error.strerror}); set TMPDIR to one"
        ) from None


def _shares_memory(config: Config) -> bool:
    return not config.run.in_one_process and config.transport in TRANSPORTS


def shared_memory_is_writable(config: Config) -> None:
    """The weights of the trainer can be put into shared memory."""
    folder = shared_folder()
    if _shares_memory(config) and not os.access(folder, os.W_OK | os.X_OK):
        raise NotHereError(
            f"{folder}: the weights go from the trainer to the engines through files in it, and it cannot be "
            "written",
            command=f"mount it writable (for a container: --shm-size=2g, and no --read-only for {folder}), "
            "or use run.mode=inline",
        )


def shared_memory_has_room(
    config: Config, model: ModelFacts | None, machine: Machine, *, on_gpu: bool
) -> None:
    """The versions of the weights that are on their way fit into shared memory. on_gpu: whether the trainer
    computes on one."""
    if model is None:
        return
    free, needed = machine.shared_memory_bytes, shared_weights_bytes(config, model, on_gpu=on_gpu)
    if _shares_memory(config) and free is not None and needed > free:
        raise NotHereError(
            f"model.path={config.model.path}: its weights, on their way to the engines "
            f"(weights.transport={config.transport}), take {format_bytes(needed)} of shared memory, and "
            f"{shared_folder()} has {format_bytes(free)} free",
            command=f"make it larger (for a container: --shm-size={needed // 10**9 + 2}g)",
        )
