"""The benchmark runs and reports every case that computes; what it measures is not judged here."""

import json
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "loop_throughput.py"


@pytest.mark.slow
def test_it_measures_the_loop_and_its_parts_alone(run_script, tiny_folder, tmp_path):
    out = tmp_path / "out.json"
    run_script(
        *(SCRIPT, "--cases", "computed", "--repeats", 1, "--steps", 2),
        *("--runs", "asynchronous", "--model", tiny_folder, "--out", out),
    )
    step_s = json.loads(out.read_text())["step_s"]
    kinds = ("generation alone", "training alone", "ideal", "asynchronous")
    assert list(step_s) == [f"computed/{kind}" for kind in kinds]
    assert all(len(values) == 1 and values[0] > 0 for values in step_s.values())
