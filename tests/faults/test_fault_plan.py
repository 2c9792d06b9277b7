"""Every fault of the plan in a running job: it ends with all its steps, and its books close.

`ASYNCRL_FAULT_MOMENTS` (`make test-faults` sets 20): so many jobs get every fault, each at a random moment
and in a random order. By default it is one.
"""

import os
import random
import signal
import sqlite3
import statistics
import subprocess
import time
from contextlib import closing
from functools import partial
from pathlib import Path

import pytest
from fault_plan import FAULTS, corrupt_weights, write_reward
from launched import ENDLESS, LONG_S

from asyncrl import config as settings
from asyncrl.liveness.pulse import read_pulse
from asyncrl.runfiles.layout import RunDir

pytestmark = pytest.mark.slow

QUICKSTART = Path(__file__).parents[2] / "configs" / "quickstart.yaml"

MOMENTS = int(os.environ.get("ASYNCRL_FAULT_MOMENTS", "0"))
SETTINGS = (
    ENDLESS,
    *("checkpoint.every_steps=5", "run.hang_s=5", "run.max_restarts=50", "rollout.max_restarts=50"),
    *("reward.timeout_s=3", "rollout.workers=1", "run.start_s=60"),
)


@pytest.fixture
def job(launch, tmp_path):
    def job(*more, **kwargs):
        return launch(*SETTINGS, f"reward.functions.0.function={write_reward(tmp_path)}", *more, **kwargs)

    return job


@pytest.mark.parametrize("moment", range(max(1, MOMENTS)))
def test_a_job_survives_a_fault_of_every_kind_at_random_moments(job, moment):
    """In an order that nobody has chosen either: some befall roles that are just being started again."""
    rng = random.Random(moment)
    run = job()
    faults = list(FAULTS.items())
    rng.shuffle(faults)
    for i, (name, fault) in enumerate(faults):
        run.wait_for_steps(1 + 3 * i)
        run.wait_a_moment(rng.uniform(0.0, 1.0), before_step=3 + 3 * i)
        print(f"{time.strftime('%X')} after {run.steps()} steps: {name}")
        fault(run, rng)
    run.wait_for_steps(4 * len(FAULTS), 3 * LONG_S)
    run.wait_for_steps(run.steps() + 4)
    run.interrupt()
    lines = run.assert_steps_are_done()
    assert max(line["staleness/max"] for line in lines) <= 2


BATCH, VERSION = "the batch of step", "every engine to take"
"""What a trainer waits for."""
ARRIVED_S = 2.0
"""What a worker had sent before it was stopped has been taken by then: a batch, or a version that it took."""


def test_weights_that_are_damaged_before_a_new_worker_takes_them_are_shared_anew(job):
    """Not by the next version: that needs the worker."""
    run = job("run.hang_s=60")  # it is killed here, not by the supervisor
    run.wait_for_steps(3)
    first = run.role("rollout-0")
    path = RunDir(run.run_dir).pulse("trainer-0")

    def stop():
        """Whether the trainer then waits for what the worker has not sampled. (Where the worker has not taken
        a version, either, the next one follows as soon as it is dead.)"""
        first.send_signal(signal.SIGSTOP)
        arrived_s, waits = time.time() + ARRIVED_S, []

        def is_waited_for():
            pulse = read_pulse(path)
            waits[:] = [wait.what for wait in pulse.waits if wait.what.startswith((BATCH, VERSION))]
            return waits and pulse.at_s > arrived_s

        run.wait(is_waited_for, "the trainer to wait for the worker")
        return waits[0].startswith(BATCH)

    while not stop():
        first.send_signal(signal.SIGCONT)
        run.wait_for_steps(run.steps() + 1)
    corrupt_weights(run, random.Random(0))
    first.kill()
    told = "trainer-0 has shared weights that are damaged; replacing"
    run.wait(lambda: told in run.output.read_text(), "the damage to be found")
    run.wait_for_steps(run.steps() + 4)
    run.interrupt()
    run.assert_steps_are_done()


def test_a_coordinator_that_hangs_before_it_is_up_is_replaced(job):
    """It is the one who would notice that others hang."""
    run = job("run.start_s=30")
    run.wait_for_steps(3)
    first = run.role("coordinator")
    run.process.send_signal(signal.SIGSTOP)
    first.kill()
    with closing(locked(RunDir(run.run_dir).ledger)):  # so that the next is not up before it is stopped
        run.process.send_signal(signal.SIGCONT)
        run.wait_for_successor(first, "coordinator")
        run.role("coordinator").send_signal(signal.SIGSTOP)
    told = "coordinator has not come up within 30 s; replacing it"
    run.wait(lambda: told in run.output.read_text(), "it to be replaced")
    run.wait_for_steps(run.steps() + 4)
    run.interrupt()
    run.assert_steps_are_done()


def locked(path):
    """A connection that lets no other open the database, once the one who has it open is dead."""
    database = sqlite3.connect(path, timeout=LONG_S, isolation_level=None)
    database.execute("pragma locking_mode = exclusive")
    database.execute("begin exclusive")
    return database


def kill_and_resume(start, run_dir, steps, times, rng):
    """A job of so many steps that `start` starts, killed whole so often, at random moments, and gone on with
    each time."""
    run = start()
    for i in range(1, times + 1):
        run.wait_a_moment(rng.uniform(3.0, 12.0), before_step=steps * i // (times + 1))
        run.kill_whole()
        run = start(resume=run_dir) if (run_dir / "prompts.msgpack").exists() else start()
    return run


@pytest.mark.timeout(1800)
def test_a_job_is_killed_whole_again_and_again_and_goes_on(job, tmp_path):
    """`kill -9` of everything at random moments, the start of the resumption included; in the short form
    without a checkpoint to go back to."""
    times = max(2, MOMENTS)
    steps = 40 * times
    start = partial(
        job, "run.resume=auto", f"run.steps={steps}", f"checkpoint.every_steps={5 if MOMENTS else steps}"
    )
    run = kill_and_resume(start, tmp_path / "run", steps, times, random.Random(times))
    assert run.end(3 * LONG_S) == 0, run.output.read_text()
    run.assert_all_steps_are_done(steps)


@pytest.mark.skipif(not MOMENTS, reason="takes minutes: `make test-faults` runs it")
@pytest.mark.timeout(1800)
def test_a_quickstart_that_is_killed_again_and_again_learns_as_much(launch, warmed_up_model, tmp_path):
    places = [f"model.path={warmed_up_model}", f"data.path={warmed_up_model / 'prompts.jsonl'}"]
    steps = 200 + 10 * MOMENTS

    def starter(name):
        more = (f"run.dir={tmp_path / name}", f"run.steps={steps}", "checkpoint.every_steps=20")
        return partial(launch, config=settings.load(QUICKSTART, [*places, *more, "run.resume=auto"]))

    def last_reward(run):
        assert run.end(6 * LONG_S) == 0, run.output.read_text()
        lines = run.assert_all_steps_are_done(steps, batch_groups=16)
        return statistics.mean(line["reward/mean"] for line in lines[-20:])

    undisturbed = last_reward(starter("undisturbed")())
    rng = random.Random("quickstart")
    killed = last_reward(kill_and_resume(starter("killed"), tmp_path / "killed", steps, MOMENTS, rng))
    print(f"mean reward of the last 20 steps: {undisturbed:.3f}; killed {MOMENTS} times: {killed:.3f}")
    assert killed > undisturbed - 0.03


@pytest.fixture
def small_disk(tmp_path):
    """A folder on a disk of 64 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True).returncode != 0:
        pytest.skip("only root can make a disk to fill")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.parametrize("moment", range(max(1, MOMENTS)))
def test_a_full_disk_ends_the_run_clearly_and_it_goes_on_once_there_is_room(job, small_disk, moment):
    run = job(f"run.dir={small_disk / 'run'}")
    run.wait_for_steps(random.Random(f"full:disk {moment}").randint(1, 12))
    filler = small_disk / "filler"
    with filler.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError:
            pass
    assert run.end(LONG_S) == 1
    text = run.output.read_text()
    assert "No room is left" in text
    assert "--resume" in text
    filler.unlink()
    steps = run.steps() + 4
    run = job(f"run.steps={steps}", resume=small_disk / "run")
    assert run.end(LONG_S) == 0, run.output.read_text()
    run.assert_all_steps_are_done(steps)
