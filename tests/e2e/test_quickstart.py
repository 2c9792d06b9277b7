"""The quickstart as a newcomer runs it: its model, its config, the real command. The reward must rise."""

import statistics
import subprocess
import sys
from pathlib import Path

import pytest

from asyncrl.observe.metric_table import REQUIRED_KEYS
from asyncrl.observe.metrics import read_metrics

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_the_quickstart_learns(warmed_up_model, tmp_path):
    model = warmed_up_model
    command = [
        *(sys.executable, "-m", "asyncrl.cli.launch", "--config", str(ROOT / "configs" / "quickstart.yaml")),
        *(f"model.path={model}", f"data.path={model / 'prompts.jsonl'}", f"run.dir={tmp_path / 'run'}"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=800)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert all(key in line for line in lines for key in REQUIRED_KEYS)
    rewards = [line["reward/mean"] for line in lines]
    assert statistics.mean(rewards[:3]) <= 0.45
    assert statistics.mean(rewards[-5:]) >= 0.85
    assert max(line["staleness/max"] for line in lines) <= 4
    assert statistics.mean(line["staleness/mean"] for line in lines) > 0
    assert "tensorboard --logdir" in done.stdout
    assert str(tmp_path / "run" / "report.html") in done.stdout
    assert f'<data value="{rewards[-1]}">' in (tmp_path / "run" / "report.html").read_text()
