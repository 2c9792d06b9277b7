"""The benchmark runs and reports every way of a weight version; what it measures is not judged here."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "weight_sync.py"


def measured(out: Path, engine: str) -> set[tuple[str, str]]:
    """What it has measured: a process of its own, as a user starts it."""
    ended = subprocess.run(
        [
            *(sys.executable, str(SCRIPT), "--sizes", "tiny", "--repeats", "1"),
            *("--engines", engine, "--out", str(out)),
        ],
        capture_output=True,
        text=True,
        timeout=280,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert ended.returncode == 0, ended.stderr
    assert "tiny: 1.4 MB" in ended.stdout
    results = json.loads(out.read_text())["results"]
    assert all(r["n_bytes"] == 1_444_864 and len(r["seconds"]) == 1 and r["seconds"][0] > 0 for r in results)
    return {(r["method"], r["what"]) for r in results}


@pytest.mark.slow
def test_it_measures_the_embedded_engine_and_what_its_updates_are_beside(tmp_path):
    both = {(method, what) for method in ("shm", "safetensors") for what in ("publish", "read")}
    engine = {("engine", what) for what in ("publish", "read", "pause")}
    assert measured(tmp_path / "out.json", "torch") == {("copy", "publish")} | both | engine


@pytest.mark.vllm
def test_it_measures_vllm(tmp_path):
    assert measured(tmp_path / "out.json", "vllm") == {("vllm", what) for what in ("read", "pause", "gap")}
