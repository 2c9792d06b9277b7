"""The benchmark runs and reports every case that computes; what it measures is not judged here."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "loop_throughput.py"


@pytest.mark.slow
def test_it_measures_the_loop_and_its_parts_alone(tiny_folder, tmp_path):
    out = tmp_path / "out.json"
    ended = subprocess.run(
        [
            *(sys.executable, str(SCRIPT), "--cases", "computed", "--repeats", "1", "--steps", "2"),
            *("--runs", "asynchronous", "--model", str(tiny_folder), "--out", str(out)),
        ],
        capture_output=True,
        text=True,
        timeout=280,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert ended.returncode == 0, ended.stderr
    step_s = json.loads(out.read_text())["step_s"]
    kinds = ("generation alone", "training alone", "ideal", "asynchronous")
    assert list(step_s) == [f"computed/{kind}" for kind in kinds]
    assert all(len(values) == 1 and values[0] > 0 for values in step_s.values())
