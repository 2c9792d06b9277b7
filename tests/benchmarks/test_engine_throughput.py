"""The benchmark runs and reports every method; what it measures is not judged here."""

import json
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "engine_throughput.py"


@pytest.fixture
def run_benchmark(run_script):
    """Its results and what it printed."""

    def run(out: Path, *args: str) -> tuple[list[dict], str]:
        printed = run_script(SCRIPT, "--new-tokens", 8, "--repeats", 2, "--out", out, *args)
        return json.loads(out.read_text())["results"], printed

    return run


def methods(results: list[dict]) -> list[tuple[int, str, str]]:
    assert all(len(r["tokens_per_s"]) == 2 and r["median_tokens_per_s"] > 0 for r in results)
    return [(r["slots"], r["lengths"], r["method"]) for r in results]


@pytest.mark.slow
def test_it_measures_every_method_of_the_embedded_engine(run_benchmark, tmp_path):
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
def test_it_measures_vllm_beside_its_bare_engine(run_benchmark, import_vllm, tmp_path):
    results, _ = run_benchmark(tmp_path / "out.json", "--engines=vllm", "--slots=2")
    assert methods(results) == [(2, "equal", "vllm"), (2, "equal", "bare vllm")]
