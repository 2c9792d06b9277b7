"""Every fault of the plan in a running job: it ends with all its steps, and its books close.

`ASYNCRL_FAULT_MOMENTS` (`make test-faults` sets 20): random moments for each fault, each in a job of its own.
By default, one job gets them all.
"""

import os
import random
import signal
import subprocess
import time

import pytest
from fault_plan import FAULTS, write_reward
from launched import LONG_S

pytestmark = pytest.mark.slow

MOMENTS = int(os.environ.get("ASYNCRL_FAULT_MOMENTS", "0"))
STEPS = 24
SETTINGS = (
    f"run.steps={STEPS}",
    *("checkpoint.every_steps=5", "run.hang_s=5", "run.max_restarts=50", "rollout.max_restarts=50"),
    *("reward.timeout_s=3", "rollout.workers=1"),
)


@pytest.fixture
def job(launch, tmp_path):
    def job(*more, **kwargs):
        return launch(*SETTINGS, f"reward.functions.0.function={write_reward(tmp_path)}", *more, **kwargs)

    return job


def strike(run, name, rng):
    """Wait for a moment that nobody has chosen, then do it."""
    time.sleep(rng.uniform(0.0, 1.0))
    if run.process.poll() is None:
        FAULTS[name](run, rng)


def test_one_job_survives_a_fault_of_every_kind(job):
    rng = random.Random(0)
    steps = 4 * len(FAULTS)
    run = job(f"run.steps={steps}")
    for i, name in enumerate(FAULTS):
        run.wait_for_steps(1 + 3 * i)
        strike(run, name, rng)
    assert run.end(3 * LONG_S) == 0, run.output.read_text()
    lines = run.assert_all_steps_are_done(steps)
    assert max(line["staleness/max"] for line in lines) <= 2


@pytest.mark.timeout(600)
@pytest.mark.parametrize("moment", range(MOMENTS))
@pytest.mark.parametrize("name", FAULTS)
def test_a_job_survives_a_fault_at_a_random_moment(job, name, moment):
    rng = random.Random(f"{name} {moment}")
    run = job()
    run.wait_for_steps(rng.randint(0, STEPS - 3))
    strike(run, name, rng)
    assert run.end(3 * LONG_S) == 0, run.output.read_text()
    lines = run.assert_all_steps_are_done(STEPS)
    assert max(line["staleness/max"] for line in lines) <= 2


@pytest.mark.timeout(900)
def test_a_job_is_killed_whole_again_and_again_and_goes_on(job):
    """`kill -9` of everything at random moments, the start of the resumption included; in the short form
    without a checkpoint to go back to."""
    rng = random.Random(MOMENTS)
    checkpoints = f"checkpoint.every_steps={5 if MOMENTS else STEPS}"
    run = job(checkpoints)
    for _ in range(max(2, MOMENTS)):
        end_s = time.monotonic() + rng.uniform(3.0, 15.0)
        while time.monotonic() < end_s and run.process.poll() is None:
            time.sleep(0.05)
        for process in [run.process, *(run.family() if run.process.poll() is None else [])]:
            process.send_signal(signal.SIGKILL)
        run.process.wait(10.0)
        started = (run.run_dir / "prompts.msgpack").exists()
        run = job(resume=run.run_dir) if started else job(checkpoints, "run.resume=auto")
    assert run.end(3 * LONG_S) == 0, run.output.read_text()
    run.assert_all_steps_are_done(STEPS)


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


def test_a_full_disk_ends_the_run_clearly_and_it_goes_on_once_there_is_room(job, small_disk):
    run = job(f"run.dir={small_disk / 'run'}")
    run.wait_for_steps(6)
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
    run = job(resume=small_disk / "run")
    assert run.end(LONG_S) == 0, run.output.read_text()
    run.assert_all_steps_are_done(STEPS)
