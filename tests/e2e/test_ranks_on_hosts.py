"""A run whose trainer's DeepSpeed ranks are on two hosts."""

import os
import signal
from pathlib import Path

import pytest
from agent_programs import Programs
from launched import LONG_S, command
from namespaces import OtherHost, other_host

from asyncrl.cluster.remote.host import HOME, RemoteHost
from asyncrl.config import load
from asyncrl.observe.metrics import read_metrics
from asyncrl.roles import ROLLOUT, names
from asyncrl.runfiles.checkpoints import Checkpoints

pytestmark = [pytest.mark.slow, pytest.mark.deepspeed, pytest.mark.timeout(1200)]
PATIENCE_S = 3 * LONG_S
"""What is started there imports everything anew."""

OTHER = "ASYNCRL_TEST_OTHER_HOST"
"""Environment variable: the name of its namespace and both addresses."""


def on_both(run_dir):
    """Rank 1 there, and all others here."""
    there = OtherHost(*os.environ[OTHER].split(","))
    network, home = load(run_dir.config).network, (*HOME, *names(ROLLOUT, 1))
    return RemoteHost(run_dir, Programs(there.command), network, home)


@pytest.fixture
def other(monkeypatch):
    with other_host() as host:
        monkeypatch.setenv(OTHER, f"{host.name},{host.here},{host.there}")
        yield host


def wait_for_steps(run, n):
    run.wait(lambda: run.steps() >= n, f"{n} steps", PATIENCE_S)


def network_of(pid):
    return Path(f"/proc/{pid}/ns/net").stat().st_ino


def rank_there(run, other_than=None):
    """The process of rank 1, which its agent has started; None while there is none."""
    found = [p for p in run.family() if command(p)[2:4] == ["asyncrl.cluster.role", "trainer-1"]]
    return next((p for p in found if p != other_than), None)


def test_ranks_on_two_hosts_train_save_die_and_go_on_as_one(launch, other):
    run = launch(
        f"run.role_host={__file__}:on_both",
        f"network.bind={other.here}",
        *("trainer.backend=deepspeed", "trainer.ranks=2", "trainer.deepspeed.zero_stage=3"),
        "trainer.deepspeed.zero={stage3_param_persistence_threshold: 0}",
        *("run.steps=100000", "checkpoint.every_steps=1"),
    )
    wait_for_steps(run, 2)
    rank = rank_there(run)
    assert (network_of(rank.pid) != network_of("self")) == bool(other.name)
    rank.kill()
    run.wait(lambda: rank_there(run, rank) is not None, "rank 1 to be started again", PATIENCE_S)
    wait_for_steps(run, run.steps() + 2)
    run.process.send_signal(signal.SIGINT)
    run.end(LONG_S)
    lines = run.assert_steps_are_done()
    # The engine sampled from the very weights that both ranks have published.
    assert all(line.get("mismatch/abs_log_ratio", 0.0) < 1e-4 for line in lines)
    newest = Checkpoints(run.run_dir / "checkpoints").newest_whole()
    files = {path.name for path in (newest.path / "training").iterdir()}
    assert {"policy.weight.0.safetensors", "policy.weight.1.safetensors"} <= files
    last = len(lines) + 1
    alone = ("run.role_host=local", "trainer.ranks=1", f"run.steps={last}")
    assert launch(*alone, resume=run.run_dir).end(PATIENCE_S) == 0
    assert len(read_metrics(run.run_dir / "metrics.jsonl")) == last
