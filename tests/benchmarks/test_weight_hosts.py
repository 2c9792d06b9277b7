"""Weights between hosts that are network namespaces: over a slow link that is pulled, to several at once."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "weight_hosts.py"
N_BYTES = 30_000_000


def can_make_hosts() -> bool:
    if os.geteuid() or not shutil.which("ip") or not shutil.which("tc"):
        return False
    name = f"asyncrl-try-{os.getpid()}"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True).returncode == 0
    subprocess.run(["ip", "netns", "del", name], capture_output=True)
    return made


@pytest.mark.slow
@pytest.mark.skipif(not can_make_hosts(), reason="network namespaces take root, `ip` and `tc`")
def test_weights_arrive_over_a_link_that_was_pulled_and_leave_the_trainers_host_once(tmp_path):
    ended = subprocess.run(
        [
            *(sys.executable, str(SCRIPT), "--hosts", "3", "--mb", str(N_BYTES // 10**6)),
            *("--rate", "100mbit", "--pull-s", "20", "--out", str(tmp_path / "out.json")),
        ],
        capture_output=True,
        text=True,
        timeout=800,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert ended.returncode == 0, ended.stderr
    one, several, delta = json.loads((tmp_path / "out.json").read_text())["results"]
    assert all(result["is_equal"] for result in (one, several, delta))
    # What was on its way when the link was pulled goes twice, and nothing else.
    assert N_BYTES < one["metrics"]["weights/sent_bytes"] < 2 * N_BYTES
    assert one["hosts"] == 1 and several["hosts"] == delta["hosts"] == 3
    assert N_BYTES < several["link_bytes"] < 1.1 * N_BYTES
    assert delta["link_bytes"] < 0.1 * N_BYTES
    assert delta["metrics"]["weights/changed_frac"] == pytest.approx(0.01, abs=0.001)
