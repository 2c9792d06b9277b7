"""Roles in an allocation of SLURM: an `srun` step each, which runs the role's agent. The launcher itself runs
on the allocation's first node, in the batch script (`launch/slurm.sbatch`)."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import msgspec

from asyncrl.cluster.hosts.base import RoleSpec
from asyncrl.cluster.remote.call import CALL, Call
from asyncrl.cluster.remote.host import RemoteHost
from asyncrl.cluster.remote.site import Site
from asyncrl.config import load
from asyncrl.errors import ConfigError, RunFailed
from asyncrl.resolve import OWN_PATH
from asyncrl.runfiles.layout import RunDir
from asyncrl.wire.addresses import own_address

STEP_END_S = 5.0
"""For a step that is told to end; then `srun` is killed, and SLURM ends the step."""
LIST_S = 30.0
_BY_SBATCH = "start it by `sbatch launch/slurm.sbatch`, or by `srun --overlap` within `salloc`"
_STEP = (
    "srun",
    "--nodes=1",
    "--ntasks=1",
    # Steps share the allocation: how, the plan says.
    *("--overlap", "--mem=0", "--cpu-bind=none", "--export=ALL", "--input=none"),
)


def slurm_host(run_dir: RunDir) -> RemoteHost:
    return RemoteHost(run_dir, SlurmStarter(), load(run_dir.config).network)


def slurm_site() -> Site:
    nodes = allocated()
    gpus = int(os.environ.get("SLURM_GPUS_ON_NODE") or 0)
    address, _ = own_address(f"tcp://{nodes[-1]}:1") if len(nodes) > 1 else ("127.0.0.1", "")
    return Site((gpus,) * len(nodes), address)


def allocated() -> list[str]:
    """The names of the allocation's nodes, this one first. Raises `ConfigError` outside of one."""
    names = os.environ.get("SLURM_JOB_NODELIST")
    if not names:
        raise ConfigError(f"run.role_host=slurm: this is no allocation of SLURM; {_BY_SBATCH}")
    command = ["scontrol", "show", "hostnames", names]
    try:
        nodes = subprocess.run(
            command, capture_output=True, text=True, check=True, timeout=LIST_S
        ).stdout.split()
    except (OSError, subprocess.SubprocessError) as error:
        raise ConfigError(f"run.role_host=slurm: {' '.join(command)}: {error}") from None
    own = os.environ.get("SLURMD_NODENAME")  # none where `salloc` leaves its user
    if own not in nodes:
        raise ConfigError(
            "run.role_host=slurm: the launcher's node computes, too, and this one is none of the "
            f"allocation's ({', '.join(nodes)}); {_BY_SBATCH}"
        )
    nodes.remove(own)
    return [own, *nodes]


class SlurmStarter:
    """A `Starter`."""

    def __init__(self) -> None:
        self._nodes = allocated()

    @asynccontextmanager
    async def holding(self, specs: Sequence[RoleSpec]) -> AsyncIterator[None]:
        yield  # the allocation holds all

    async def home_env(self, spec: RoleSpec) -> dict[str, str]:
        return {}  # the batch script sees the node's GPUs of the allocation

    async def run(self, spec: RoleSpec, call: Call) -> None:
        where = f"--nodelist={self._nodes[spec.node]}", f"--job-name={spec.name}"
        cores = [f"--cpus-per-task={n}"] if (n := os.environ.get("SLURM_CPUS_ON_NODE")) else []
        program = sys.executable, "-m", "asyncrl.cluster.remote.agent"
        step = await asyncio.create_subprocess_exec(
            *(*_STEP, *where, *cores, *program),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            env={**os.environ, **OWN_PATH, CALL: msgspec.json.encode(call).decode()},
            start_new_session=True,  # Ctrl-C is the supervisor's to pass on
        )
        try:
            _, said = await step.communicate()
        except asyncio.CancelledError:
            step.terminate()
            try:
                await asyncio.wait_for(step.wait(), STEP_END_S)
            except TimeoutError:
                step.kill()
            raise
        if step.returncode:
            last = said.decode(errors="replace").strip().splitlines()[-1:]
            raise RunFailed(f"its step ended with status {step.returncode}: {' '.join(last)}")
