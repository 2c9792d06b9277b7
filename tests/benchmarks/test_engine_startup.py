"""The benchmark runs both starts; what it measures is not judged here."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "engine_startup.py"


@pytest.mark.vllm
def test_it_measures_our_start_beside_vllms_own(tmp_path):
    out = tmp_path / "out.json"
    ended = subprocess.run(
        [sys.executable, str(SCRIPT), "--repeats", "1", "--warm", "--out", str(out)],
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert ended.returncode == 0, ended.stderr
    result = json.loads(out.read_text())
    assert all(len(result["seconds"][method]) == 1 for method in ("ours", "bare"))
    assert result["ratio"] > 0
