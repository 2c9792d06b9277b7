"""The ablation runs and writes its tables; what it measures is not judged here."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "staleness_ablation.py"


@pytest.mark.slow
def test_a_quick_ablation_writes_its_tables_and_its_plot(tmp_path, tiny_folder):
    ended = subprocess.run(
        [
            *(sys.executable, str(SCRIPT), "--quick", "--seeds", "1"),
            *("--model", str(tiny_folder), "--out", str(tmp_path)),
        ],
        capture_output=True,
        text=True,
        timeout=280,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert ended.returncode == 0, ended.stderr
    record = json.loads((tmp_path / "result.json").read_text())
    assert list(record["final_reward"]) == ["ppo/0", "ppo/2", "topr/0", "topr/2"]
    table = (tmp_path / "by-lag.md").read_text().splitlines()
    assert table[0] == "| objective | lag 0 | lag 2 | kept at 2 |"
    assert len(table) == 4
    assert len(record["claims"]) == 3
    for name in ("plot.png", "table.csv", "table.md", "runs.csv"):
        assert (tmp_path / name).exists()
