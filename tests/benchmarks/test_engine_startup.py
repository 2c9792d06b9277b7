"""The benchmark runs both starts; what it measures is not judged here."""

import json
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "engine_startup.py"


@pytest.mark.vllm
def test_it_measures_our_start_beside_vllms_own(run_script, import_vllm, tmp_path):
    out = tmp_path / "out.json"
    run_script(SCRIPT, "--repeats", 1, "--warm", "--out", out, forks=True)
    result = json.loads(out.read_text())
    assert all(len(result["seconds"][method]) == 1 for method in ("ours", "bare"))
    assert result["ratio"] > 0
