"""The benchmark runs and reports; what it measures is not judged here."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "episodes_throughput.py"


@pytest.mark.slow
def test_it_measures_a_case(tmp_path):
    out = tmp_path / "results" / "out.json"
    ended = subprocess.run(
        [
            *(sys.executable, str(SCRIPT), "--slots", "4", "--seconds", "2", "--step-ms", "1"),
            *("--cases", "as slots", "--out", str(out)),
        ],
        capture_output=True,
        text=True,
        timeout=240,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert ended.returncode == 0, ended.stderr
    (result,) = json.loads(out.read_text())["results"]
    assert result["case"] == "as slots"
    assert result["most_episodes"] == 4
    assert result["tokens_per_s"] > 0 <= result["again"] <= 1
    assert "as slots" in ended.stdout
