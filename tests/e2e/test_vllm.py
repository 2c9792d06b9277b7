"""Whole runs on real vLLM engines."""

import signal

import pytest
from launched import LONG_S, command

import asyncrl
from asyncrl.observe.metrics import read_metrics

pytestmark = [pytest.mark.slow, pytest.mark.vllm]


def assert_ledger_closes(line):
    where = ("trained", "failed", "dropped", "in_flight")
    assert line["ledger/generated_groups"] == sum(line[f"ledger/{w}_groups"] for w in where)


def test_a_run_on_vllm_trains_within_its_bound(make_config, assert_nothing_left):
    config = make_config("rollout.engine=vllm", "run.steps=5")
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
    assert_nothing_left(result.run_dir)


def test_one_of_two_vllm_workers_is_killed_and_replaced(launch):
    run = launch(
        "rollout.engine=vllm", "rollout.workers=2", "rollout.slots=8", "run.steps=400", "trainer.lr=1e-5"
    )
    run.wait_for_steps(3)
    first = run.role("rollout-0")
    engine = engine_core(first)
    first.kill()
    run.wait(lambda: not engine.is_running(), "the end of the killed worker's engine", 10)
    run.wait(lambda: any(p.pid != first.pid for p in run.roles("rollout-0")), "a new worker", 10)
    assert run.end(2 * LONG_S) == 0
    lines = read_metrics(run.run_dir / "metrics.jsonl")
    assert len(lines) == 400
    for line in lines:
        assert_ledger_closes(line)
    assert lines[-1]["ledger/trained_groups"] == 1600
    assert lines[-1]["ledger/failed_groups"] == 0
    assert max(line["rollout/workers"] for line in lines[-50:]) == 2
    assert max(line["staleness/max"] for line in lines) <= 2
    assert "rollout-0 was killed by SIGKILL; starting it again" in run.output.read_text()


def test_an_engine_that_hangs_is_replaced(launch):
    """The worker's own loop lives: it is the worker that notices."""
    run = launch("rollout.engine=vllm", "rollout.vllm.answer_timeout_s=5", "run.steps=60", "trainer.lr=1e-5")
    run.wait_for_steps(3)
    first = run.role("rollout-0")
    engine = engine_core(first)
    engine.send_signal(signal.SIGSTOP)
    run.wait_for_successor(first, "rollout-0")
    run.wait(lambda: not engine.is_running(), "the end of the engine that hung", 10)
    assert run.end(2 * LONG_S) == 0
    lines = run.assert_all_steps_are_done(60)
    assert max(line["staleness/max"] for line in lines) <= 2
    assert "rollout-0 ended with status 1 (" in run.output.read_text()


def engine_core(worker):
    """The process in which vLLM computes."""
    (found,) = [p for p in worker.children(recursive=True) if "EngineCore" in " ".join(command(p))]
    return found
