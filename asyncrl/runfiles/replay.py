"""Training again what a run has trained on: the same batches, from its ledger."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from asyncrl import config as settings
from asyncrl.affinity import torch_threads
from asyncrl.config import Config, TrainerConfig
from asyncrl.core.records import Batch
from asyncrl.errors import AsyncRLError
from asyncrl.observe.metrics import FILE_NAME, read_metrics
from asyncrl.reward.statistics import RewardScaler
from asyncrl.runfiles.checkpoints import Checkpoints
from asyncrl.runfiles.layout import RunDir
from asyncrl.runfiles.state import open_ledger
from asyncrl.section import with_values
from asyncrl.trainer.backend import backend_of, make_trainer
from asyncrl.wire.codec import decode_group


class ReplayError(AsyncRLError):
    """What was trained on is not there any more."""


@dataclass(frozen=True, slots=True)
class ReplayedStep:
    """A training step that was done again. Metrics are NaN where the run has written none."""

    step: int
    """Steps done with it: counts from 1, as in the metrics."""
    loss: float
    recorded_loss: float
    grad_norm: float
    recorded_grad_norm: float
    same_weights: bool | None
    """Whether the weights are those of the run's checkpoint of this step, bit by bit; None where it has
    none."""


def replay(run_dir: str | Path, from_step: int = 0, to_step: int | None = None) -> Iterator[ReplayedStep]:
    """Train the steps after `from_step` (which has to have a checkpoint, or be 0) again.

    The trainer is one process in plain torch; a run of several ranks is repeated up to rounding. Raises
    `CheckpointError`, and `ReplayError` where the batch of a step was not kept.
    """
    directory = RunDir(Path(run_dir))
    config = _alone(settings.load(directory.config))
    checkpoints = Checkpoints(directory.checkpoints)
    trainer, scaler = make_trainer(config), RewardScaler(config.reward)
    if from_step:
        checkpoint = checkpoints.at(from_step)
        checkpoint.verify()
        trainer.restore(checkpoint.path)
        scaler.load(checkpoint.state().reward_statistics)
    recorded = {line["step"]: line for line in read_metrics(directory.path / FILE_NAME)}
    hashes = {c.step: c.state().weights_hash for c in checkpoints.all()}
    last = max(recorded, default=0) if to_step is None else to_step
    for step in range(from_step, last):
        batch = _batch(config, directory, step)
        line, weights_hash = recorded.get(step + 1, {}), hashes.get(step + 1)
        with torch_threads(int(line.get("threads/trainer", config.trainer.threads))):
            metrics = scaler(batch) | trainer.step(batch, line.get("schedule/total_steps"))
        yield ReplayedStep(
            step + 1,
            metrics["loss"],
            line.get("loss", math.nan),
            metrics["grad_norm"],
            line.get("grad_norm", math.nan),
            None if weights_hash is None else trainer.snapshot().weights_hash() == weights_hash,
        )


def _alone(config: Config) -> Config:
    """By the default backend where the run's own does not train in one process."""
    if not backend_of(config).why_not_inline:
        return config
    return with_values(config, {"trainer.backend": TrainerConfig().backend, "trainer.ranks": 1})


def _batch(config: Config, run_dir: RunDir, step: int) -> Batch:
    with open_ledger(run_dir) as store:
        groups = tuple(decode_group(wire) for wire in store.batch_of(step))
    if not groups:
        raise ReplayError(
            f"{run_dir.ledger} has not kept the batch of step {step}: set run.record=true to replay a whole "
            "run, or begin at a later step"
        )
    return Batch(step, step, step - config.staleness.bound, groups)
