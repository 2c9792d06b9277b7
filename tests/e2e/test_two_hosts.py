"""A run over two hosts that are network namespaces: across a slow link that is pulled, with a guest that
comes and goes. (That it learns there, `benchmarks/two_hosts.py` shows.)"""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from network_hosts import BENCHMARKS, needs_hosts

PACED = "rollout.engine=paced", "trainer.backend=paced", "trainer.paced.step_s=0.3"


@pytest.mark.slow
@needs_hosts
@pytest.mark.skipif(not Path("/dev/net/tun").exists(), reason="packets are held back by a tun device")
def test_a_run_over_two_hosts_loses_nothing_whatever_its_link_and_guests_do(tiny_folder, tmp_path):
    out = tmp_path / "out.json"
    ended = subprocess.run(
        [
            *(sys.executable, str(BENCHMARKS / "two_hosts.py"), "--cases", "disturbed"),
            *("--model", str(tiny_folder), "--guests", "1", "--pull-s", "3", "--reward", "0"),
            *("--out", str(out), *PACED),
        ],
        capture_output=True,
        text=True,
        timeout=800,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr  # it looks into the ledger itself
    [found] = json.loads(out.read_text())["results"]
    assert found["restarts"] == 0
    assert found["steps"] >= 5
    assert found["link_bytes_a_step"] > 0
