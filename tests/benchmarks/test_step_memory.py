"""The benchmark measures every head; what it measures is not judged here."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "step_memory.py"


@pytest.mark.slow
def test_it_measures_every_head(tmp_path):
    out = tmp_path / "peaks.json"
    size = ["--vocabulary", "8000", "--tokens", "512", "--hidden", "64", "--layers", "1"]
    command = [sys.executable, str(SCRIPT), *size, "--json", str(out)]
    subprocess.run(command, check=True, timeout=800)
    peaks = json.loads(out.read_text())
    assert set(peaks) == {"fused", "naive", "one token"}
    assert all(mib > 0 for mib in peaks.values())
