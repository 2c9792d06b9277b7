"""Run directories as runs leave them."""

import json

import pytest

from asyncrl.observe.metric_table import REQUIRED_KEYS

CONFIG = """
run: {steps: 40}
model: {path: m}
data: {path: d.jsonl}
reward: {functions: [{function: asyncrl.tiny.skill:exact_match}]}
trainer: {lr: 0.002}
"""


def metrics_line(step, **changes):
    ledger = {"generated": 4 * step + 3, "trained": 4 * step - 2, "dropped": 1, "failed": 1, "in_flight": 3}
    tokens = {"trained": 90 * step, "masked": 5, "dropped": 10, "failed": 15, "in_flight": 30}
    line = (
        dict.fromkeys(REQUIRED_KEYS, 0.5)
        | {"step": step, "version": step, "wall_s": 3.0 * step}
        | {"reward/mean": step**0.5 / 3, "reward/std": 0.1, "staleness/mean": 1.25, "staleness/max": 3.0}
        | {f"ledger/{fate}_groups": n for fate, n in ledger.items()}
        | {f"ledger/{fate}_tokens": n for fate, n in tokens.items()}
        | {"time/step_s": 3.0, "time/wait_s": 0.5, "time/train_s": 2.0, "time/publish_s": 0.25}
        | {"time/checkpoint_s": 0.0, "time/other_s": 0.25}
        | {"age/0/tokens": 30.0, "age/0/kl": 0.0, "age/2/tokens": 60.0, "age/2/kl": 0.01 * step}
    )
    return line | {key.replace("__", "/"): value for key, value in changes.items()}


@pytest.fixture
def make_line():
    return metrics_line


@pytest.fixture
def make_run(tmp_path):
    def make(name="run", lines=(), config=CONFIG):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "config.yaml").write_text(config)
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        return folder

    return make
