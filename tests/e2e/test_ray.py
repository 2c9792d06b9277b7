"""The quickstart on a Ray cluster of two nodes, of which much is killed."""

import os
import statistics
import sys

import psutil
import pytest
from launched import ENDLESS, LONG_S, Launched

from asyncrl import config as settings
from asyncrl.observe.metrics import read_metrics

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


@pytest.fixture
def nodes(monkeypatch):
    """The cluster, of two raylets, and the second of them. Either has room for the run."""
    pytest.importorskip("ray", reason="Ray is not installed (`pip install 'asyncrl[ray]'` installs it)")
    from ray.cluster_utils import Cluster

    # Its processes do not inherit a path that only this process has set.
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, sys.path)))
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False})
    second = cluster.add_node(num_cpus=1)
    monkeypatch.setenv("RAY_ADDRESS", cluster.address)
    yield cluster, second
    cluster.shutdown()


def role(name):
    """Its process, below which actor it may be; None while there is none."""
    for process in psutil.process_iter():
        try:
            is_role = process.cmdline()[2:4] == ["asyncrl.cluster.role", name]
            if is_role and process.parent().cmdline()[0].startswith("ray::"):  # not of another test's run
                return process
        except (psutil.Error, AttributeError, IndexError):  # it, or its parent, has just ended
            continue
    return None


def deaths(run):
    return run.output.read_text().count(" was killed by SIGKILL; starting it again")


def last_rewards(run):
    return statistics.mean(line["reward/mean"] for line in read_metrics(run.run_dir / "metrics.jsonl")[-5:])


def test_the_quickstart_learns_on_ray_whatever_dies(nodes, warmed_up_model, tmp_path, assert_nothing_left):
    cluster, second = nodes
    model = warmed_up_model
    overrides = [f"model.path={model}", f"data.path={model / 'prompts.jsonl'}", f"run.dir={tmp_path / 'run'}"]
    overrides += [ENDLESS, "rollout.workers=2", "run.role_host=ray"]
    run = Launched(settings.load("quickstart.yaml", overrides), tmp_path, assert_nothing_left, typed=True)
    try:
        run.wait_for_steps(3)
        pulse = run.run_dir / ".pulse" / "rollout-1"
        run.wait(pulse.exists, "the second worker")  # the first may have done all of it
        worker = role("rollout-1")
        actor = worker.parent()
        assert "_Agent.carry_out" in actor.cmdline()[0], "an actor runs it"
        actor.kill()
        run.wait(lambda: deaths(run) >= 1, "the death of an actor's process")
        run.wait(lambda: (found := role("rollout-1")) and found.pid != worker.pid, "its successor")
        run.wait(lambda: not worker.is_running(), "the end of what it had started")
        run.wait(pulse.exists, "a pulse from there")
        cluster.remove_node(second, allow_graceful=False)
        run.wait(lambda: deaths(run) >= 2, "the death of a raylet")
        run.wait(lambda: last_rewards(run) >= 0.8, "it to learn", 3 * LONG_S)
        run.interrupt()
    finally:
        if run.process.poll() is None:
            run.kill_whole()
    lines = run.assert_steps_are_done(batch_groups=16)
    assert statistics.mean(line["reward/mean"] for line in lines[:3]) <= 0.45
