"""The quickstart as a newcomer runs it: its model, its config, the real command. The reward must rise."""

import statistics
import subprocess
import sys
from pathlib import Path

import pytest
from pages import CHROMIUM, CURVES, DARK, LIGHT, Page, check_numbers, opened

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
    report = tmp_path / "run" / "report.html"
    assert str(report) in done.stdout
    check_numbers(Page(report.read_text("utf-8")), lines)
    for width, height, scheme in ((1280, 6000, LIGHT), (390, 14_000, DARK)) if CHROMIUM else ():
        seen = opened(report, tmp_path, width, height, scheme)
        assert seen.console == []
        assert seen.colours[CURVES[scheme]] > 10_000  # pixels, of curves and bars
