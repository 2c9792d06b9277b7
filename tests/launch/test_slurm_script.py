"""What `launch/slurm.sbatch` does when SLURM says that the end is near."""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

SBATCH = Path(__file__).parents[2] / "launch" / "slurm.sbatch"
LAUNCHER = """#!/bin/bash
trap 'echo ended >> "$SAID"; kill "$!"; exit 130' TERM
sleep 60 &
echo "$*" >> "$SAID"
wait
"""
SCONTROL = """#!/bin/bash
case $1 in
    show) echo "JobId=7 JobState=$STATE Reason=None" ;;
    requeue) echo "requeue $2" >> "$SAID" ;;
esac
"""


@pytest.mark.parametrize(("state", "again"), [("RUNNING", ["requeue 7"]), ("CANCELLED", [])])
def test_a_job_whose_time_is_over_is_queued_again_and_a_cancelled_one_is_not(tmp_path, state, again):
    for name, text in ("asyncrl-launch", LAUNCHER), ("scontrol", SCONTROL):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    said = tmp_path / "said"
    job = {"SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_NAME": "rl", "SLURM_JOB_ID": "7", "STATE": state}
    environment = {**os.environ, **job, "SAID": str(said), "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    script = subprocess.Popen(["bash", str(SBATCH), "grlo.yaml", "run.seed=1"], env=environment)
    try:
        deadline_s = time.monotonic() + 60
        while not said.exists() or not said.read_text():
            assert time.monotonic() < deadline_s
            time.sleep(0.02)
        script.send_signal(signal.SIGTERM)
        assert script.wait(60) == 130
    finally:
        script.kill()
    started, *rest = said.read_text().splitlines()
    assert started.startswith("--cluster slurm --nodes 2 --config grlo.yaml run.dir=runs/rl-7")
    assert rest == ["ended", *again]
