"""Processes of a real run on cores of their own."""

import os
import sys
from contextlib import suppress

import pytest
from launched import ENDLESS, command, engine_cores

from asyncrl.plan.machine import probe

CORES = set(probe().own_cores)
FIRST, SECOND = set(sorted(CORES)[:1]), set(sorted(CORES)[1:2])

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="only Linux lets a process choose its cores"),
    pytest.mark.skipif(len(CORES) < 2, reason="trainer and engine need a core each"),
]


def cores_of(*processes):
    """Those that all of their threads may use."""
    cores = set()
    for thread in (thread for process in processes for thread in process.threads()):
        with suppress(ProcessLookupError):  # it has just ended
            cores |= os.sched_getaffinity(thread.id)
    return cores


def test_engine_and_trainer_keep_to_their_cores_and_nobody_else_has_to(launch):
    run = launch("placement.pin_cores=auto", ENDLESS)
    run.wait_for_steps(2)
    worker = run.role("rollout-0")
    assert cores_of(run.role("trainer-0")) == FIRST
    assert cores_of(worker) == SECOND
    (rewards,) = [p for p in worker.children() if "asyncrl.reward.processes.process" in command(p)]
    assert cores_of(rewards) == cores_of(run.role("coordinator")) == CORES
    run.interrupt()


@pytest.mark.vllm
def test_what_vllm_starts_keeps_to_the_engine_s_cores(launch, fork_vllm):
    run = launch("placement.pin_cores=auto", "rollout.engine=vllm", ENDLESS)
    run.wait_for_steps(1)
    worker = run.role("rollout-0")
    rewards = [p for p in worker.children() if "asyncrl.reward.processes.process" in command(p)]
    engines = engine_cores(worker)
    assert (len(rewards), len(engines)) == (1, 1)
    assert cores_of(*engines) == SECOND
    assert cores_of(*rewards) == CORES
    run.interrupt()


def test_with_more_threads_than_cores_nobody_is_pinned(launch):
    run = launch("placement.pin_cores=auto", f"rollout.threads={len(CORES)}", ENDLESS)
    run.wait_for_steps(1)
    assert cores_of(run.role("trainer-0")) == cores_of(run.role("rollout-0")) == CORES
    run.interrupt()
