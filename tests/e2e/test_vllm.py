"""Whole runs on real vLLM engines."""

import signal

import pytest
from launched import ENDLESS, LONG_S, engine_cores
from role_times import adding_up, check_role_times

import asyncrl
from asyncrl.liveness.pulse import read_pulse
from asyncrl.observe.metrics import read_metrics
from asyncrl.runfiles.layout import RunDir

pytestmark = [pytest.mark.slow, pytest.mark.vllm]


def assert_ledger_closes(line):
    where = ("trained", "failed", "dropped", "in_flight")
    assert line["ledger/generated_groups"] == sum(line[f"ledger/{w}_groups"] for w in where)


def test_a_run_on_vllm_trains_within_its_bound(make_config, assert_nothing_left):
    config = make_config("rollout.engine=vllm", "run.steps=5")
    with adding_up(config.run.dir):
        result = asyncrl.run(config, progress=False)
    lines = read_metrics(result.run_dir / "metrics.jsonl")
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5]
    assert max(line["staleness/max"] for line in lines) <= 2
    assert max(line["staleness/mean"] for line in lines) > 0
    for line in lines:
        assert_ledger_closes(line)
        # The sampler's logprobs are the trainer's: a ratio of the same version is 1 but for float rounding.
        if line["staleness/max"] == 0:
            assert line["ratio/mean"] == pytest.approx(1.0, abs=1e-4)
    check_role_times(lines, rollout_0={"generate", "swap"})
    assert_nothing_left(result.run_dir)


REWARD_THAT_WAITS = """
import time
from pathlib import Path

HERE = Path(__file__).parent
calls = 0


def reward(completions, **_):
    global calls
    calls += 1
    while calls > 24 and not (HERE / "go").exists():
        time.sleep(0.05)
    return [float(i) for i in range(len(completions))]
"""


def test_one_of_two_vllm_workers_is_killed_and_replaced(launch, fork_vllm, tmp_path):
    """The run waits for the new one: it would be over before that is up."""
    (tmp_path / "waits.py").write_text(REWARD_THAT_WAITS)
    run = launch(
        *("rollout.engine=vllm", "rollout.workers=2", "rollout.slots=8", "run.steps=40", "trainer.lr=1e-5"),
        f"reward.functions.0.function={tmp_path / 'waits.py'}:reward",
        *(f"reward.timeout_s={LONG_S}", f"run.stall_s={2 * LONG_S}"),
    )
    run.wait_for_steps(3)
    first = run.role("rollout-0")
    engine = engine_core(run, first)
    first.kill()
    run.wait(lambda: not engine.is_running(), "the end of the killed worker's engine")
    run.wait_for_successor(first, "rollout-0")
    second, path = run.role("rollout-0").pid, RunDir(run.run_dir).pulse("rollout-0")

    def is_up():
        pulse = read_pulse(path)
        return pulse and pulse.pid == second and any("group" in wait.what for wait in pulse.waits)

    run.wait(is_up, "the new worker to ask for groups or to have some")
    (tmp_path / "go").touch()
    assert run.end(2 * LONG_S) == 0
    lines = run.assert_all_steps_are_done(40)
    for line in lines:
        assert_ledger_closes(line)
    assert lines[-1]["ledger/trained_groups"] == 160
    assert lines[-1]["ledger/failed_groups"] == 0
    assert max(line["rollout/workers"] for line in lines[-20:]) == 2
    assert max(line["staleness/max"] for line in lines) <= 2
    assert "rollout-0 was killed by SIGKILL; starting it again" in run.output.read_text()


def test_an_engine_that_hangs_is_replaced(launch, fork_vllm):
    """The worker's own loop lives: it is the worker that notices."""
    run = launch("rollout.engine=vllm", "rollout.vllm.answer_timeout_s=10", ENDLESS, "trainer.lr=1e-5")
    run.wait_for_steps(3)
    first = run.role("rollout-0")
    engine = engine_core(run, first)
    engine.send_signal(signal.SIGSTOP)
    run.wait_for_successor(first, "rollout-0")
    run.wait(lambda: not engine.is_running(), "the end of the engine that hung")
    run.wait_for_steps(run.steps() + 3)
    run.interrupt()
    lines = run.assert_steps_are_done()
    assert max(line["staleness/max"] for line in lines) <= 2
    assert "rollout-0 ended with status 1 (" in run.output.read_text()


def engine_core(run, worker):
    """The process in which vLLM computes. (The first steps may all be another worker's.)"""
    run.wait(lambda: engine_cores(worker), "the worker's engine")
    (only,) = engine_cores(worker)
    return only
