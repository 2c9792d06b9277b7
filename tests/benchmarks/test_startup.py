"""The benchmark starts runs in both ways; what it measures is not judged here."""

import json
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "startup.py"


@pytest.mark.slow
def test_it_measures_every_phase(run_script, tiny_folder, tmp_path):
    out = tmp_path / "out.json"
    run_script(SCRIPT, "--model", tiny_folder, "--repeats", 1, "--kill", "coordinator", "--out", out)
    seconds = json.loads(out.read_text())["seconds"]
    phases = ["settings", "checks", "roles", "step", "first step", "cpu", "restart"]
    assert all(list(measured) == phases for measured in [*seconds["forked"], *seconds["alone"]])
