"""A trainer that takes the time a GPU would take and computes nothing: for measuring the loop around it."""

from __future__ import annotations

import json
import math
import time
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from asyncrl.config import Config
from asyncrl.core.records import Batch
from asyncrl.rendezvous import open_store
from asyncrl.states import doing
from asyncrl.trainer.metrics import batch_metrics
from asyncrl.trainer.packing.batch import check_staleness, flatten
from asyncrl.trainer.state import FOLDER, RestoreError
from asyncrl.waits import waiting
from asyncrl.weights.hashes import hash_weights
from asyncrl.weights.published import WholeWeights

PACED = "paced.json"
ORDER_TIMEOUT_S = 24 * 3600.0
"""Longest wait for rank 0's next step. Its death breaks the connection at once."""
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


class PacedRanks:
    """Ranks that begin each step with rank 0 and wait for each other at its end. What they have to take their
    time for, they know. rendezvous: a file that does not exist yet, the same for all."""

    def __init__(self, config: Config, rank: int, rendezvous: Path) -> None:
        self._step_s = config.trainer.paced.step_s
        self._rank, size = rank, config.trainer.ranks
        store = open_store(rendezvous, rank, size)
        with waiting("the other ranks of the trainer"):
            store.set(f"rank {rank}", "here")
            store.wait([f"rank {other}" for other in range(size)], timedelta(seconds=config.run.start_s))
        longest = timedelta(seconds=ORDER_TIMEOUT_S)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=longest)

    def begin(self, *, step: bool) -> bool:
        """Whether a step begins, by what rank 0 says; else it is the end."""
        order = torch.tensor([float(step)])
        with waiting("the next order of rank 0", state="wait_orders"):
            dist.broadcast(order, 0)
        return bool(order)

    def end(self) -> None:
        with waiting("the other ranks' steps"):
            dist.barrier()

    def follow(self) -> None:
        while self.begin(step=False):
            with doing("forward_backward"):
                time.sleep(self._step_s)
                self.end()
        self.close()

    def close(self) -> None:
        if self._rank == 0:
            self.begin(step=False)
        dist.destroy_process_group()


class PacedTrainer:
    """Checks and counts each batch as a real trainer does, then waits until `trainer.paced.step_s` have
    passed, and its ranks are there, where it has several.

    Its weights are one tensor: the number of steps taken, and random numbers, of which no delta is small.
    """

    def __init__(self, config: Config, rendezvous: Path | None = None) -> None:
        self._ranks = None
        if config.trainer.ranks > 1:
            assert rendezvous is not None
            self._ranks = PacedRanks(config, 0, rendezvous)
        self._step_s = config.trainer.paced.step_s
        self._max_staleness = config.staleness.max_staleness
        self._weights = WholeWeights({"paced.weight": torch.zeros(config.trainer.paced.weights)})

    def step(self, batch: Batch, total_steps: int | None = None) -> dict[str, float]:
        end = time.monotonic() + self._step_s
        if self._ranks is not None:
            self._ranks.begin(step=True)
        flat = flatten(batch)
        check_staleness(flat, self._max_staleness)
        metrics = dict(batch_metrics(batch, flat)) | dict.fromkeys(NOT_COMPUTED, math.nan)
        self._change(int(self._weights["paced.weight"][0]) + 1)
        time.sleep(max(0.0, end - time.monotonic()))
        if self._ranks is not None:
            self._ranks.end()
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
        self._change(steps)

    def _change(self, steps: int) -> None:
        self._weights["paced.weight"].uniform_(generator=torch.Generator().manual_seed(steps))[0] = steps

    def close(self) -> None:
        if self._ranks is not None:
            self._ranks.close()
