"""The benchmark runs and reports every method; what it measures is not judged here."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "engine_throughput.py"


def run_benchmark(out: Path, *args: str) -> tuple[list[dict], str]:
    """Its results and what it printed: a process of its own, as a user starts it."""
    ended = subprocess.run(
        [sys.executable, str(SCRIPT), "--new-tokens", "8", "--repeats", "2", "--out", str(out), *args],
        capture_output=True,
        text=True,
        timeout=240,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert ended.returncode == 0, ended.stderr
    return json.loads(out.read_text())["results"], ended.stdout


def methods(results: list[dict]) -> list[tuple[int, str, str]]:
    assert all(len(r["tokens_per_s"]) == 2 and r["median_tokens_per_s"] > 0 for r in results)
    return [(r["slots"], r["lengths"], r["method"]) for r in results]


@pytest.mark.slow
def test_it_measures_every_method_of_the_embedded_engine(tmp_path):
    results, printed = run_benchmark(tmp_path / "results" / "out.json", "--engines=torch", "--slots=2,3")
    assert methods(results) == [
        (slots, lengths, method)
        for slots in (2, 3)
        for lengths, method in [
            ("equal", "engine"),
            ("equal", "bare"),
            ("equal", "generate"),
            ("equal", "continuous"),
            ("mixed", "engine"),
            ("mixed", "generate"),
            ("mixed", "continuous"),
        ]
    ]
    assert "engine is" in printed


@pytest.mark.vllm
def test_it_measures_vllm_beside_its_bare_engine(tmp_path):
    results, _ = run_benchmark(tmp_path / "out.json", "--engines=vllm", "--slots=2")
    assert methods(results) == [(2, "equal", "vllm"), (2, "equal", "bare vllm")]
