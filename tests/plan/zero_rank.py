"""One rank of DeepSpeed on gloo. For each config it trains two updates of two micro-batches each of a model
with one large parameter, and writes what lived meanwhile, in bytes, to `CONFIG.RANK.json`."""

import json
from pathlib import Path

import torch
from live_bytes import LiveBytes
from torch import nn

from asyncrl import config as settings
from asyncrl.trainer.backends.deepspeed.group import RankGroup

RANKS = 2
LARGEST, LAYER, LAYERS = (2048, 128), (128, 128), 48
PARAMETERS = LARGEST[0] * LARGEST[1] + LAYERS * LAYER[0] * LAYER[1]


class Stack(nn.Module):
    """No activation of it is worth counting."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.table = nn.Embedding(*LARGEST, dtype=dtype)
        self.layers = nn.Sequential(*(nn.Linear(*LAYER, bias=False, dtype=dtype) for _ in range(LAYERS)))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.layers(self.table(ids)).float().mean()


def count(config: settings.Config) -> dict[str, int]:
    """`between`: after an update. `peak`: of passes and updates."""
    from asyncrl.trainer.backends.deepspeed.learner import DeepSpeedLearner  # not where tests are collected

    with LiveBytes("cpu") as live:
        learner = DeepSpeedLearner(Stack(getattr(torch, config.model.dtype)), config)
        live.peak_since()
        for step in range(2):
            for _ in range(2):
                learner.backward(learner(torch.zeros(1, dtype=torch.int64)))
            learner.update(1e-3, step)
        return {"between": live.now, "peak": live.peak}


def main(rank: int, paths: list[Path]) -> None:
    torch.set_num_threads(1)
    configs = [settings.load(path) for path in paths]
    group = RankGroup(rank, RANKS, paths[0].with_suffix(".ranks"), torch.device("cpu"), 60.0)
    for config, path in zip(configs, paths, strict=True):
        path.with_suffix(f".{rank}.json").write_text(json.dumps(count(config)))
    group.close()
