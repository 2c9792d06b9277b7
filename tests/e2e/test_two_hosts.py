"""A run over two hosts that are network namespaces: across a slow link that is pulled, with a guest that
comes and goes."""

import json
import subprocess
import sys

import pytest
from network_hosts import BENCHMARKS, needs_hosts

SCRIPT = BENCHMARKS / "two_hosts.py"


@pytest.mark.slow
@needs_hosts
def test_the_quickstart_learns_from_a_host_that_is_far_away(warmed_up_model, tmp_path):
    out = tmp_path / "out.json"
    ended = subprocess.run(
        [
            *(sys.executable, str(SCRIPT), "--cases", "disturbed", "--model", str(warmed_up_model)),
            *("--guests", "1", "--pull-s", "3", "--out", str(out)),
        ],
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    [found] = json.loads(out.read_text())["results"]
    assert found["first_reward"] <= 0.45
    assert found["last_reward"] >= 0.85
    assert found["restarts"] == 0
    assert found["link_bytes_a_step"] > 0
