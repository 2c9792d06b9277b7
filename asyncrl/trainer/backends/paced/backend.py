"""A trainer that takes the time a GPU would take and computes nothing: for measuring the loop around it."""

from __future__ import annotations

import json
import math
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from asyncrl.config import Config
from asyncrl.core.records import Batch
from asyncrl.trainer.metrics import batch_metrics
from asyncrl.trainer.packing.batch import check_staleness, flatten
from asyncrl.trainer.state import FOLDER, RestoreError, hash_weights
from asyncrl.weights.published import WholeWeights

WEIGHT_ELEMENTS = 1024
PACED = "paced.json"
NOT_COMPUTED = ("ess", "ratio/mean", "kl/behavior", "clip_frac", "entropy")
"""Metrics that every line has, and that need a policy."""


@dataclass(frozen=True, slots=True)
class PacedSnapshot:
    """`Snapshot` of a trainer that has taken so many steps."""

    steps: int

    def write(self, folder: Path) -> None:
        path = folder / FOLDER / PACED
        path.parent.mkdir()
        path.write_text(json.dumps({"steps": self.steps}) + "\n")

    def weights_hash(self) -> str:
        return hash_weights(["paced.weight"], lambda _: torch.tensor(float(self.steps)))


class PacedTrainer:
    """Checks and counts each batch as a real trainer does, then waits until `trainer.paced.step_s` have
    passed.

    Its weights are one small tensor filled with the number of steps taken, so that each version differs.
    """

    def __init__(self, config: Config) -> None:
        self._step_s = config.trainer.paced.step_s
        self._max_staleness = config.staleness.max_staleness
        self._weights = WholeWeights({"paced.weight": torch.zeros(WEIGHT_ELEMENTS)})

    def step(self, batch: Batch, total_steps: int | None = None) -> dict[str, float]:
        end = time.monotonic() + self._step_s
        flat = flatten(batch)
        check_staleness(flat, self._max_staleness)
        metrics = dict(batch_metrics(batch, flat)) | dict.fromkeys(NOT_COMPUTED, math.nan)
        self._weights["paced.weight"] += 1
        time.sleep(max(0.0, end - time.monotonic()))
        return metrics

    def weights(self) -> WholeWeights:
        return self._weights

    def canary(self) -> None:
        return None

    def snapshot(self) -> PacedSnapshot:
        return PacedSnapshot(int(self._weights["paced.weight"][0]))

    def restore(self, folder: Path) -> None:
        path = folder / FOLDER / PACED
        try:
            steps = json.loads(path.read_text())["steps"]
        except (OSError, ValueError, KeyError) as error:
            raise RestoreError(f"{path}: cannot be read ({error!r}); no paced trainer wrote it") from error
        self._weights["paced.weight"].fill_(steps)

    def close(self) -> None: ...
