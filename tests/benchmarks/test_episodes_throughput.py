"""The benchmark runs and reports; what it measures is not judged here."""

import json
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "episodes_throughput.py"


@pytest.mark.slow
def test_it_measures_a_case(run_script, tmp_path):
    out = tmp_path / "results" / "out.json"
    settings = ("--slots", 4, "--seconds", 2, "--step-ms", 1, "--cases", "as slots", "--out", out)
    printed = run_script(SCRIPT, *settings)
    (result,) = json.loads(out.read_text())["results"]
    assert result["case"] == "as slots"
    assert result["most_episodes"] == 4
    assert result["tokens_per_s"] > 0 <= result["again"] <= 1
    assert "as slots" in printed
