"""The benchmark runs and reports every way of a weight version; what it measures is not judged here."""

import json
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "weight_sync.py"


@pytest.fixture
def measured(run_script, tmp_path):
    """`measured(engine)`: what it has measured."""

    def measured(engine: str) -> set[tuple[str, str]]:
        out = tmp_path / "out.json"
        printed = run_script(SCRIPT, "--sizes", "tiny", "--repeats", 1, "--engines", engine, "--out", out)
        assert "tiny: 1.4 MB" in printed
        results = json.loads(out.read_text())["results"]
        assert all(r["n_bytes"] == 1_444_864 for r in results)
        assert all(len(r["seconds"]) == 1 and r["seconds"][0] > 0 for r in results)
        return {(r["method"], r["what"]) for r in results}

    return measured


@pytest.mark.slow
def test_it_measures_the_embedded_engine_and_what_its_updates_are_beside(measured):
    both = {(method, what) for method in ("shm", "safetensors") for what in ("publish", "read")}
    engine = {("engine", what) for what in ("publish", "read", "pause")}
    assert measured("torch") == {("copy", "publish")} | both | engine


@pytest.mark.vllm
def test_it_measures_vllm(measured, import_vllm):
    assert measured("vllm") == {("vllm", what) for what in ("read", "pause", "gap")}
