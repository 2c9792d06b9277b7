"""Workers and reward models that join a run and leave it: each is `asyncrl join`, in a process of its own."""

import signal

import psutil
import pytest
from forked_server import start
from launched import ENDLESS, LONG_S

from asyncrl.liveness.pulse import read_pulse
from asyncrl.observe.metrics import read_metrics

pytestmark = pytest.mark.slow


@pytest.fixture
def join(launch, tmp_path):
    """`join(run)`: a guest of a run, as a process that prints into `tmp_path / "guest.txt"`."""
    started = []

    def join(run, *words, typed=False):
        with (tmp_path / "guest.txt").open("w") as output:
            command = ("asyncrl.cli.main", "join", str(run.run_dir / "join"), *words)
            started.append(start(*command, output=output, typed=typed))
        return started[-1]

    yield join
    for guest in started:
        if guest.poll() is None:
            guest.kill()


def said(run, words):
    return lambda: words in run.output.read_text()


def test_guests_join_and_leave_and_nothing_is_lost(
    launch, join, make_reward_model, assert_nothing_left, tmp_path
):
    paced = "rollout.engine=paced", "trainer.backend=paced", "rollout.slots=8"
    model = f"reward.models=[{{path: {make_reward_model(tmp_path / 'judge')}, dtype: float32}}]"
    run = launch(ENDLESS, "rollout.guests=1", "reward.guests=1", model, "run.hang_s=8", *paced)
    run.wait((run.run_dir / "join").exists, "the run's address")
    assert (run.run_dir / "join").stat().st_mode & 0o077 == 0, "it holds the keys"

    guest = join(run, typed=True)
    pulse = run.run_dir / ".pulse" / "rollout-1"
    run.wait(pulse.exists, "a guest at work")
    assert "rollout-1 joins from" in run.output.read_text()
    second = join(run)
    assert second.wait(LONG_S) == 1
    assert "no more than 1 workers may join (rollout.guests)" in (tmp_path / "guest.txt").read_text()
    run.wait_for_steps(run.steps() + 2)

    scorer = join(run, "--scores", "judge")
    work = run.run_dir / ".pulse" / "reward-1"
    run.wait(lambda: (pulse := read_pulse(work)) and pulse.work and pulse.work.done, "a guest that scores")
    scorer.send_signal(signal.SIGTERM)
    run.wait(said(run, "reward-1 has left: it ended with status"), "it to leave")
    assert scorer.wait(60) == 0

    guest.send_signal(signal.SIGTERM)  # as a cluster wants a machine back
    run.wait(said(run, "rollout-1 has left: it ended with status 0"), "it to leave in good order")
    assert guest.wait(60) == 0
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
    assert run.process.wait(LONG_S) == 130
    assert_nothing_left(run.run_dir, killed=True)  # the killed guest's folder goes with the next process
    assert not (run.run_dir / "join").exists()
    last = read_metrics(run.run_dir / "metrics.jsonl")[-1]
    assert last["ledger/failed_groups"] == 0


EPISODE = """
import asyncio
import os
from pathlib import Path

HERE = Path({here!r})


async def slow(task, model):
    first = await model.generate(task.prompt_ids, max_new_tokens=4)
    await asyncio.sleep(0.2)
    while (HERE / "hold").exists():
        (HERE / f"held-{{os.getpid()}}").touch()
        await asyncio.sleep(0.05)
    await model.generate([*task.prompt_ids, *first.token_ids, 5], max_new_tokens=4)
"""


def test_a_guest_carries_out_episodes_until_it_is_gone(launch, join, assert_nothing_left, tmp_path):
    (tmp_path / "own.py").write_text(EPISODE.format(here=str(tmp_path)))
    run = launch(
        *(ENDLESS, "rollout.engine=paced", "trainer.backend=paced", "rollout.slots=8"),
        *(f"rollout.episode={tmp_path / 'own.py'}:slow", "rollout.episode_guests=1"),
    )
    run.wait((run.run_dir / "join").exists, "the run's address")
    guest = join(run, "--episodes", "3")
    run.wait(said(run, "episodes-0 joins from"), "a guest")

    def shares():
        return [line.get("episodes/guests_frac", 0) for line in read_metrics(run.run_dir / "metrics.jsonl")]

    run.wait(lambda: run.steps() and shares()[-1] > 0, "episodes on the guest")
    pulse = read_pulse(run.run_dir / ".pulse" / "episodes-0")
    assert pulse.work.what == "episodes" and pulse.work.done > 0
    (tmp_path / "hold").touch()
    role = psutil.Process(pulse.pid)
    run.wait(
        lambda: any((tmp_path / f"held-{child.pid}").exists() for child in role.children(recursive=True)),
        "an episode that is held on the guest",
    )
    role.kill()
    (tmp_path / "hold").unlink()
    log = run.run_dir / "logs" / "rollout-0.log"
    again = "is carried out again: episodes-0 has left, or does not answer"
    run.wait(lambda: again in log.read_text(), "its episodes to begin again")
    assert guest.wait(LONG_S) == 1
    run.wait_for_steps(run.steps() + 4)
    run.process.send_signal(signal.SIGINT)
    assert run.process.wait(LONG_S) == 130
    assert_nothing_left(run.run_dir)
    assert any(0 < share < 1 for share in shares()), "some had no place there"
    assert shares()[-1] == 0, "and all go on here"
    assert read_metrics(run.run_dir / "metrics.jsonl")[-1]["ledger/failed_groups"] == 0
