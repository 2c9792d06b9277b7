"""Workers that join a run and leave it: each is `asyncrl join`, in a process of its own."""

import signal
import subprocess
import sys

import psutil
import pytest

from asyncrl.observe.metrics import read_metrics

pytestmark = pytest.mark.slow


@pytest.fixture
def join(launch):
    """`join(run)`: a guest of a run, as a `subprocess.Popen`."""
    started = []

    def join(run):
        command = [sys.executable, "-m", "asyncrl.cli.main", "join", str(run.run_dir / "join")]
        started.append(subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True))
        return started[-1]

    yield join
    for guest in started:
        guest.kill()


def said(run, words):
    return lambda: words in run.output.read_text()


def test_workers_join_and_leave_and_nothing_is_lost(launch, join, assert_nothing_left):
    paced = "rollout.engine=paced", "trainer.backend=paced", "rollout.slots=8"
    run = launch("run.steps=100000", "rollout.guests=1", "run.hang_s=5", *paced)
    run.wait((run.run_dir / "join").exists, "the run's address")
    assert (run.run_dir / "join").stat().st_mode & 0o077 == 0, "it holds the keys"

    guest = join(run)
    pulse = run.run_dir / ".pulse" / "rollout-1"
    run.wait(pulse.exists, "a guest at work")
    assert "rollout-1 joins from" in run.output.read_text()
    second = join(run)
    out, _ = second.communicate(timeout=120)
    assert second.returncode == 1
    assert "no more than 1 workers may join (rollout.guests)" in out
    run.wait_for_steps(run.steps() + 2)

    guest.send_signal(signal.SIGTERM)  # as a cluster wants a machine back
    run.wait(said(run, "rollout-1 has left: it ended with status 0"), "it to leave in good order")
    assert guest.wait(30) == 0
    assert not pulse.exists()
    run.wait_for_steps(run.steps() + 2)

    guest = join(run)  # and once more, to be killed with its role, as a machine that is gone
    run.wait(pulse.exists, "a guest at work")
    family = psutil.Process(guest.pid).children(recursive=True)
    for process in [psutil.Process(guest.pid), *family]:
        process.kill()
    run.wait(said(run, "rollout-1 has left: it has not moved"), "its absence to be noticed", timeout_s=180)
    run.wait_for_steps(run.steps() + 2)
    run.process.send_signal(signal.SIGINT)
    assert run.process.wait(20.0) == 130
    assert_nothing_left(run.run_dir, killed=True)  # the killed guest's folder goes with the next process
    assert not (run.run_dir / "join").exists()
    last = read_metrics(run.run_dir / "metrics.jsonl")[-1]
    assert last["ledger/failed_groups"] == 0
