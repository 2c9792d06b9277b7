"""Runs of all that the flagship recipes use, on a CPU: two DeepSpeed ranks, a critic, a vLLM engine, a reward
model, the canary, checkpoints."""

import re
from pathlib import Path

import pytest
from forked_server import RUN_FIRST
from launched import LONG_S

from asyncrl.runfiles.checkpoints import Checkpoints

pytestmark = [pytest.mark.slow, pytest.mark.vllm, pytest.mark.deepspeed, pytest.mark.timeout(1800)]

FAULTY_ENGINE = Path(__file__).parent / "faulty_engine.py"
LAYER = "model.layers.1.mlp.down_proj"
BATCH = 8
STEPS = 12


@pytest.fixture
def flagship(make_config, make_reward_model, tmp_path):
    judge = make_reward_model(tmp_path / "judge")
    return make_config(
        *("rollout.engine=vllm", "rollout.group_size=1", f"trainer.batch_groups={BATCH}"),
        *("trainer.backend=deepspeed", "trainer.ranks=2", "trainer.mini_batches=2"),
        "trainer.gradient_checkpointing=true",
        *("objective.advantage=vtrace", "critic={lr: 1e-3}"),
        *("reward.functions=[]", f"reward.models=[{{path: {judge}, dtype: float32}}]"),
        *("run.steps=1000", "checkpoint.every_steps=1", "trainer.deepspeed.zero_stage=2"),
    )


@pytest.fixture
def spoil_engines(monkeypatch, fork_vllm):
    """`spoil_engines(n)`: engines of runs that are started now take n weight versions rightly, and miss a
    layer of every later one. None: all is well again."""

    def spoil(right_loads):
        monkeypatch.setenv(RUN_FIRST, "" if right_loads is None else str(FAULTY_ENGINE))
        monkeypatch.setenv("ASYNCRL_TEST_RIGHT_LOADS", str(right_loads))
        monkeypatch.setenv("ASYNCRL_TEST_LEFT_OUT", LAYER)

    return spoil


def end_by_the_canary(run):
    """The version at which the run has ended. (An engine may skip versions.)"""
    assert run.end(LONG_S) == 1
    output = run.output.read_text()
    found = re.search(r"rollout-0 ended with .* weight version (\d+): the engine", output)
    assert found, output
    assert LAYER in output
    return int(found[1])


def test_zero_2_and_3_with_vllm_train_prove_their_weights_save_and_go_on(launch, flagship, spoil_engines):
    spoil_engines(3)
    run = launch(config=flagship)
    assert end_by_the_canary(run) >= 3
    assert 1 <= Checkpoints(run.run_dir / "checkpoints").all()[0].step < STEPS

    spoil_engines(None)
    zero_3 = "trainer.deepspeed={zero_stage: 3, zero: {stage3_param_persistence_threshold: 0}}"
    run = launch(zero_3, f"run.steps={STEPS}", resume=run.run_dir)
    assert run.end(LONG_S) == 0, run.output.read_text()
    lines = run.assert_all_steps_are_done(STEPS, batch_groups=BATCH)
    assert max(line["staleness/max"] for line in lines) > 0
    for line in lines:
        assert line["skipped_updates"] == line["critic/skipped_updates"] == 0
        assert "reward/judge/mean" in line
        if line["staleness/max"] == 0:
            assert line["mismatch/abs_log_ratio"] < 1e-4

    spoil_engines(1)
    run = launch(zero_3, "run.steps=1000", resume=run.run_dir)
    assert end_by_the_canary(run) > STEPS
