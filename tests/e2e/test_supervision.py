"""Roles that hang, or without which nothing goes on, in the middle of a run through the real command."""

import os
import re
import signal

import pytest
from launched import ENDLESS, LONG_S
from test_ranks import RANKS

from asyncrl.observe.metrics import read_metrics

pytestmark = pytest.mark.slow


def pids(run, *names):
    return {name: run.role(name).pid for name in names}


def stop_with_leases(run, worker):
    """So that it surely has some when it dies."""

    def is_stopped_with_leases():
        worker.send_signal(signal.SIGSTOP)
        if run.leased() == 0:
            worker.send_signal(signal.SIGCONT)
            return False
        return True

    run.wait(is_stopped_with_leases, "a worker to be stopped with leases")


def test_each_role_is_replaced_and_the_others_go_on(launch):
    run = launch(ENDLESS, "checkpoint.every_steps=5")
    run.wait_for_steps(8)
    others = pids(run, "trainer-0", "rollout-0")
    first = run.role("coordinator")
    first.kill()
    run.wait_for_successor(first, "coordinator")
    run.wait_for_steps(run.steps() + 3)
    assert pids(run, *others) == others
    # What the worker was at, it has finished.
    assert read_metrics(run.run_dir / "metrics.jsonl")[-1]["ledger/returned_leases"] == 0

    others = pids(run, "coordinator", "rollout-0")
    first = run.role("trainer-0")
    first.kill()
    run.wait_for_successor(first, "trainer-0")
    assert pids(run, *others) == others

    others = pids(run, "coordinator", "trainer-0")
    first = run.role("rollout-0")
    stop_with_leases(run, first)
    first.kill()
    run.wait_for_successor(first, "rollout-0")
    assert pids(run, *others) == others

    def returned_leases():
        return read_metrics(run.run_dir / "metrics.jsonl")[-1]["ledger/returned_leases"]

    run.wait(returned_leases, "the dead worker's leases to be trained on")
    run.interrupt()
    lines = run.assert_steps_are_done()
    assert max(line["staleness/max"] for line in lines) <= 2
    text = run.output.read_text()
    for name, it in (("coordinator", "it"), ("trainer-0", "all of the trainer"), ("rollout-0", "it")):
        assert f"{name} was killed by SIGKILL; starting {it} again" in text


@pytest.mark.deepspeed
def test_the_ranks_are_replaced_together(launch):
    run = launch(*RANKS, ENDLESS, "checkpoint.every_steps=2")
    run.wait_for_steps(3)
    first = {name: run.role(name) for name in ("trainer-0", "trainer-1")}
    first["trainer-1"].kill()
    done = run.steps()
    for name, process in first.items():
        run.wait_for_successor(process, name)
    run.wait_for_steps(done + 2)
    run.interrupt()
    run.assert_steps_are_done(batch_groups=16)
    assert "trainer-1 was killed by SIGKILL; starting all of the trainer again" in run.output.read_text()


def test_a_worker_that_holds_up_the_run_is_found_and_replaced(launch):
    """It is not taken for hung: nobody waits for a sign of life here."""
    run = launch(ENDLESS, "run.stall_s=8")
    run.wait_for_steps(3)
    first = run.role("rollout-0")
    first.send_signal(signal.SIGSTOP)
    run.wait_for_successor(first, "rollout-0")
    run.wait_for_steps(run.steps() + 3)
    run.interrupt()
    run.assert_steps_are_done()
    text = run.output.read_text()
    assert "no training step has ended for" in text
    assert re.search(r"trainer-0 waits for (the batch of step|every engine to take weight version)", text)
    assert "rollout-0 holds up step" in text
    stacks = (run.run_dir / "logs" / "trainer-0.stacks").read_text()
    assert "most recent call first" in stacks


@pytest.mark.parametrize("policy", ["restart", "end"])
def test_a_stall_that_a_new_worker_does_not_end_ends_the_run(launch, tmp_path, policy):
    hanging = tmp_path / "hanging.py"
    hanging.write_text("import time\ndef hanging(completions, **_):\n    time.sleep(3600)\n")
    run = launch(
        f"reward.functions.0.function={hanging}:hanging",
        "reward.timeout_s=3000",
        "run.stall_s=10",
        f"run.on_stall={policy}",
    )
    assert run.end(LONG_S) == 1
    text = run.output.read_text()
    assert "The trainer has waited for the batch of step 0 for" in text
    assert "rollout-0 waits for the rewards of group 0 (for" in text
    assert text.count("rollout-0 holds up step 0; replacing it") == (1 if policy == "restart" else 0)


REWARD_WITH_TRAPS = """
import sys
import time
from pathlib import Path

HERE = Path(__file__).parent
calls = 0


def wait_for(condition):
    deadline = time.monotonic() + 100
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.05)


if "asyncrl.reward.processes.process" in sys.orig_argv:
    wait_for((HERE / "go").exists)


def reward(completions, **_):
    global calls
    calls += 1
    if calls > 8:
        wait_for((HERE / "run/checkpoints/step_2/state.json").is_fifo)
    return [float(i) for i in range(len(completions))]
"""
"""It holds the run up while it is imported, and after the second step, until the test has come so far."""


def test_a_run_says_what_keeps_it_from_its_first_step_and_from_its_end(launch, tmp_path):
    """Before it removes a checkpoint, the trainer reads what reward it had: here from a pipe, for ever."""
    (tmp_path / "traps.py").write_text(REWARD_WITH_TRAPS)
    run = launch(
        f"reward.functions.0.function={tmp_path / 'traps.py'}:reward",
        *("run.steps=4", "run.stall_s=5", "run.on_stall=end", "staleness.max_staleness=0"),
        *("checkpoint.every_steps=2", "checkpoint.keep_last=1", "checkpoint.keep_best=1"),
    )
    run.wait(lambda: "rollout-0: starting the reward functions" in run.output.read_text(), "the status")
    (tmp_path / "go").touch()
    state = run.run_dir / "checkpoints" / "step_2" / "state.json"
    run.wait(state.exists, "the first checkpoint")
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    pipe.replace(state)
    assert run.end(LONG_S) == 1
    text = run.output.read_text()
    assert re.search(r"trainer-0: (starting|loading the model)", text)  # the last one, as it is first seen
    assert "starting" not in text[text.index("step 1/4") :]
    for part in (
        "trainer-0: writing the checkpoint of step 4",
        "after its last step",
        "The trainer has done all 4 steps but has not ended.",
        "trainer-0 waits for the checkpoint of step 4 to be written (for",
    ):
        assert part in text, part


def test_responses_of_a_few_tokens_cost_no_worker(launch):
    """Versions then follow each other faster than an engine takes them, and notices overtake welcomes."""
    run = launch("rollout.max_new_tokens=3", "run.steps=100", "trainer.lr=1e-5")
    assert run.end(2 * LONG_S) == 0
    run.assert_all_steps_are_done(100)
    assert "ended with status" not in run.output.read_text()
    assert "again" not in run.output.read_text()
