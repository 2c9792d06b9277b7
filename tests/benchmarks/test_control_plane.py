"""The benchmark's parts meet, each in its process; what it measures is not judged here."""

import json
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "control_plane.py"


@pytest.mark.slow
def test_it_tells_what_a_group_costs_the_coordinator_part_by_part(run_script, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    out = tmp_path / "out.json"
    sizes = ["--batch", 8, "--eta", 2, "--workers", 2, "--steps", 2, "--repeats", 1]
    run_script(SCRIPT, "--cases", "groups", *sizes, "--out", out)
    (measured,) = json.loads(out.read_text())["cases"]["groups"]
    assert measured["groups_per_s"] > 0
    parts = measured["parts_us"]
    assert {"decode", "ledger", "store", "encode", "wire", "wire, I/O thread"} <= parts.keys()
    assert sum(parts.values()) == pytest.approx(measured["cpu_us"], rel=0.05)
