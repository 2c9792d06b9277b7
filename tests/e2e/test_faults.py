"""Roles killed in the middle of a run, by the real signals, through the real command."""

import os
import signal
import sqlite3

import psutil
import pytest
from launched import LONG_S

from asyncrl.observe.metrics import read_metrics

pytestmark = pytest.mark.slow


def test_a_role_that_may_not_be_restarted_ends_the_run_clearly(launch):
    run = launch("run.steps=100000", "run.max_restarts=0")
    run.wait_for_steps(3)
    run.role("coordinator").kill()
    assert run.end(LONG_S) == 1
    assert "coordinator was killed by SIGKILL" in run.output.read_text()
    with sqlite3.connect(run.run_dir / "ledger.db") as db:
        assert db.execute("pragma integrity_check").fetchone() == ("ok",)
        assert db.execute("select count(*) from groups where state = 'trained'").fetchone()[0] >= 12
    assert len(read_metrics(run.run_dir / "metrics.jsonl")) >= 3


def test_a_termination_ends_everything(launch):
    """As a cluster asks for it. (What Ctrl-C does: the last lines of the test below.)"""
    run = launch("run.steps=100000", "rollout.workers=2", "rollout.slots=8", typed=True)
    run.wait_for_steps(2)
    run.process.send_signal(signal.SIGTERM)
    assert run.end(LONG_S) == 130
    assert "Traceback" not in run.output.read_text()


def test_the_roles_end_when_the_launcher_itself_is_killed(launch, assert_nothing_left):
    run = launch("run.steps=100000", typed=True)
    run.wait_for_steps(2)
    family = run.family()
    run.process.kill()
    _, alive = psutil.wait_procs(family, timeout=LONG_S)
    assert alive == []
    assert_nothing_left(run.run_dir, killed=True)


def test_a_worker_that_dies_again_and_again_ends_the_run(launch, tmp_path):
    suicidal = tmp_path / "suicidal.py"
    suicidal.write_text(
        "import os, signal\n"
        "def suicidal(completions, **_):\n"
        "    os.kill(os.getppid(), signal.SIGKILL)\n"
        "    return [0.0] * len(completions)\n"
    )
    run = launch(f"reward.functions.0.function={suicidal}:suicidal", "rollout.max_restarts=1")
    assert run.end(LONG_S) == 1
    assert "rollout-0 was killed by SIGKILL after 1 restarts" in run.output.read_text()


def test_what_a_reward_function_has_started_does_not_outlive_its_worker(launch, tmp_path):
    command = ["sleep", f"3571.{os.getpid()}"]  # so that it can be told from another session's
    starter = tmp_path / "starter.py"
    starter.write_text(
        "import functools, subprocess\n"
        f"start = functools.cache(lambda: subprocess.Popen({command}, start_new_session=True))\n"
        "def starter(completions, **_):\n"
        "    start()\n"
        "    return [0.0] * len(completions)\n"
    )

    def sleeping():
        return {p.pid for p in psutil.process_iter(["cmdline"]) if p.info["cmdline"] == command}

    run = launch(f"reward.functions.0.function={starter}:starter", "run.steps=100000", typed=True)
    run.wait_for_steps(1)
    first = sleeping()
    run.role("rollout-0").kill()
    run.wait(lambda: sleeping() - first, "the new worker's reward process")
    assert not sleeping() & first
    run.interrupt()
    assert sleeping() == set()
    assert "Traceback" not in run.output.read_text()
