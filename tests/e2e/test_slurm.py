"""A run by `launch/slurm.sbatch`: on a real cluster of one node where SLURM is installed and this is root,
and everywhere on two nodes whose `srun` and `scontrol` do the same here. Its trainer's ranks meet over
TCP."""

import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import forked_programs
import pytest
from launched import LONG_S
from ports import free_port

from asyncrl.config import dump
from asyncrl.observe.metrics import read_metrics

pytestmark = pytest.mark.slow
SBATCH = Path(__file__).parents[2] / "launch" / "slurm.sbatch"
STEPS = 3
SRUN = """#!/bin/bash
echo "srun $*" >> "$SRUN_LOG"
while [[ $1 == --* ]]; do shift; done
exec "$@"
"""
SCONTROL = """#!/bin/bash
[[ $1 == show ]] && printf '%s\\n' localhost localhost
[[ $1 == requeue ]] && echo "requeued $2" >> "$SRUN_LOG"
exit 0
"""
CONF = """ClusterName=one
SlurmctldHost={name}(127.0.0.1)
SlurmctldPort={controller}
SlurmdPort={daemon}
SlurmUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
AuthInfo=socket={folder}/munge.socket
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
MpiDefault=none
SlurmdParameters=config_overrides
NodeName={name} NodeAddr=127.0.0.1 CPUs=2
PartitionName=all Nodes=ALL Default=YES State=UP
"""


@pytest.fixture
def programs(tmp_path, monkeypatch):
    """`asyncrl-launch`, forked, on the path; what is beside it there is found first."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, sys.path)))
    with forked_programs.programs(folder):
        yield folder


def add(folder, name, text):
    (folder / name).write_text(text)
    (folder / name).chmod(0o755)


@pytest.fixture
def pretended(programs, tmp_path, monkeypatch):
    add(programs, "srun", SRUN)
    add(programs, "scontrol", SCONTROL)
    monkeypatch.setenv("SRUN_LOG", str(tmp_path / "srun.log"))
    job = {
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_JOB_NODELIST": "two",
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_NAME": "rl",
        "SLURMD_NODENAME": "localhost",
    }
    for name, value in job.items():
        monkeypatch.setenv(name, value)
    return ["bash"]


@pytest.fixture
def real(programs, tmp_path_factory, monkeypatch):
    if os.geteuid() or not all(map(shutil.which, ("munged", "slurmctld", "slurmd"))):
        pytest.skip("needs root, and SLURM (Debian: `apt-get install slurmctld slurmd munge`)")
    folder = tmp_path_factory.mktemp("slurm")
    for path in (folder, folder.parent, folder.parent.parent, folder.parent.parent.parent):
        path.chmod(path.stat().st_mode | 0o011)  # munge wants every folder above its socket to be open
    for name in ("state", "spool"):
        (folder / name).mkdir()
    key = folder / "munge.key"
    key.write_bytes(os.urandom(1024))
    key.chmod(0o400)
    facts = {"name": socket.gethostname().partition(".")[0], "folder": folder}
    (folder / "slurm.conf").write_text(CONF.format(**facts, controller=free_port(), daemon=free_port()))
    monkeypatch.setenv("SLURM_CONF", str(folder / "slurm.conf"))
    files = {"key-file": key, "socket": folder / "munge.socket", "log-file": folder / "munge.log"}
    files |= {"seed-file": folder / "munge.seed", "pid-file": folder / "munge.pid"}
    daemons = [
        ["munged", "--foreground", "--force", *(f"--{name}={path}" for name, path in files.items())],
        ["slurmctld", "-D", "-c"],
        ["slurmd", "-D", "-c"],
    ]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    started = [subprocess.Popen(daemon, **quiet) for daemon in daemons]
    deadline_s = time.monotonic() + LONG_S
    while "idle" not in subprocess.run(["sinfo", "-h", "-o", "%T"], capture_output=True, text=True).stdout:
        assert time.monotonic() < deadline_s, (folder / "slurmctld.log").read_text()
        time.sleep(0.2)
    yield ["sbatch", "--wait", f"--output={folder / 'job'}"]
    for process in reversed(started):
        process.terminate()
        process.wait(120)


@pytest.mark.parametrize("cluster", ["pretended", "real"])
def test_a_run_in_an_allocation(cluster, request, make_config, tmp_path, assert_nothing_left):
    command = request.getfixturevalue(cluster)
    paced = "rollout.engine=paced", "trainer.backend=paced", "trainer.ranks=2", f"run.steps={STEPS}"
    config = make_config(*paced)
    path = tmp_path / "plain.yaml"
    path.write_text(dump(config))
    done = subprocess.run(
        [*command, str(SBATCH), str(path), f"run.dir={config.run.dir}", "run.seed=1"],
        capture_output=True,
        text=True,
        timeout=800,
    )
    run = Path(config.run.dir)
    logs = "".join(log.read_text() for log in run.glob("logs/*.log"))
    assert done.returncode == 0, done.stdout + done.stderr + logs
    assert len(read_metrics(run / "metrics.jsonl")) == STEPS
    assert "seed: 1" in (run / "config.yaml").read_text()
    assert "role_host: slurm" in (run / "config.yaml").read_text()
    assert {log.stem for log in run.glob("logs/*.log")} == {
        "coordinator",
        "trainer-0",
        "trainer-1",
        "rollout-0",
    }
    assert_nothing_left(run)
    if cluster == "pretended":
        steps = (tmp_path / "srun.log").read_text().splitlines()
        assert sorted(line.partition("--job-name=")[2].split()[0] for line in steps) == [
            "rollout-0",
            "trainer-1",
        ]
