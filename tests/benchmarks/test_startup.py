"""The benchmark starts runs in both ways; what it measures is not judged here."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "startup.py"


@pytest.mark.slow
def test_it_measures_every_phase(tiny_folder, tmp_path):
    out = tmp_path / "out.json"
    ended = subprocess.run(
        [
            *(sys.executable, str(SCRIPT), "--model", str(tiny_folder), "--repeats", "1"),
            *("--kill", "coordinator", "--out", str(out)),
        ],
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert ended.returncode == 0, ended.stderr
    seconds = json.loads(out.read_text())["seconds"]
    phases = ["settings", "checks", "roles", "step", "first step", "cpu", "restart"]
    assert all(list(measured) == phases for measured in [*seconds["forked"], *seconds["alone"]])
