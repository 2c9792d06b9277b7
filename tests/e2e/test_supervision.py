"""Roles that hang, or without which nothing goes on, in the middle of a run through the real command."""

import signal

import pytest
from launched import LONG_S
from test_ranks import RANKS

pytestmark = pytest.mark.slow

HANG_S = 5.0


def pids(run, *names):
    return {name: run.role(name).pid for name in names}


def test_a_worker_that_does_not_move_is_replaced(launch):
    run = launch("run.steps=30", f"run.hang_s={HANG_S}")
    run.wait_for_steps(3)
    first = run.role("rollout-0")
    first.send_signal(signal.SIGSTOP)
    run.wait_for_successor(first, "rollout-0")
    assert run.end(LONG_S) == 0
    run.assert_all_steps_are_done(30)
    assert "rollout-0 has not moved for" in run.output.read_text()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_the_coordinator_is_replaced_and_the_others_go_on(launch, number):
    run = launch("run.steps=40", f"run.hang_s={HANG_S}", "rollout.workers=2", "rollout.slots=8")
    run.wait_for_steps(3)
    others = pids(run, "trainer-0", "rollout-0", "rollout-1")
    first = run.role("coordinator")
    first.send_signal(number)
    run.wait_for_successor(first, "coordinator")
    steps = run.steps()
    run.wait_for_steps(steps + 3)
    assert pids(run, *others) == others
    assert run.end(LONG_S) == 0
    lines = run.assert_all_steps_are_done(40)
    assert lines[-1]["ledger/returned_leases"] == 0  # what the workers were at, they finished


def test_the_trainer_goes_on_from_its_last_checkpoint(launch):
    run = launch("run.steps=30", "checkpoint.every_steps=5", f"run.hang_s={HANG_S}")
    run.wait_for_steps(8)
    others = pids(run, "coordinator", "rollout-0")
    first = run.role("trainer-0")
    first.kill()
    run.wait_for_successor(first, "trainer-0")
    assert pids(run, *others) == others
    assert run.end(LONG_S) == 0
    lines = run.assert_all_steps_are_done(30)
    assert max(line["staleness/max"] for line in lines) <= 2


@pytest.mark.deepspeed
def test_the_ranks_are_replaced_together(launch):
    run = launch(*RANKS, "run.steps=8", "checkpoint.every_steps=2")
    run.wait_for_steps(3)
    first = {name: run.role(name) for name in ("trainer-0", "trainer-1")}
    first["trainer-1"].kill()
    for name, process in first.items():
        run.wait_for_successor(process, name)
    assert run.end(2 * LONG_S) == 0
    run.assert_all_steps_are_done(8, batch_groups=16)
    assert "trainer-1 was killed by SIGKILL; starting all of the trainer again" in run.output.read_text()


def test_a_worker_that_holds_up_the_run_is_found_and_replaced(launch):
    """It is not taken for hung: nobody waits for a sign of life here."""
    run = launch("run.steps=20", "run.stall_s=8")
    run.wait_for_steps(3)
    first = run.role("rollout-0")
    first.send_signal(signal.SIGSTOP)
    run.wait_for_successor(first, "rollout-0")
    assert run.end(LONG_S) == 0
    run.assert_all_steps_are_done(20)
    text = run.output.read_text()
    assert "no training step has ended for" in text
    assert "trainer-0 waits for the batch of step" in text
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
