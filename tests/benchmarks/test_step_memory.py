"""The benchmark measures every head; what it measures is not judged here."""

import json
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "step_memory.py"


@pytest.mark.slow
def test_it_measures_every_head(run_script, tmp_path):
    out = tmp_path / "peaks.json"
    size = ["--vocabulary", "8000", "--tokens", "512", "--hidden", "64", "--layers", "1"]
    run_script(SCRIPT, *size, "--json", out, forks=True)
    peaks = json.loads(out.read_text())
    assert set(peaks) == {"fused", "naive", "one token"}
    assert all(mib > 0 for mib in peaks.values())
