"""Whole runs whose trainer is two DeepSpeed ranks, PPO with a critic, and a KL to a reference."""

import pytest
import torch
from launched import ENDLESS, LONG_S
from role_times import check_role_times
from transformers import AutoModelForCausalLM

import asyncrl
from asyncrl.observe.metrics import read_metrics

pytestmark = [pytest.mark.slow, pytest.mark.deepspeed]

RANKS = (
    "trainer.backend=deepspeed",
    "trainer.ranks=2",
    "trainer.mini_batches=2",
    "rollout.group_size=1",
    "trainer.batch_groups=16",
    "objective.advantage=vtrace",
    "critic={}",
    "reference={where: loss, kl_coef: 0.01}",
)


def test_a_run_on_two_ranks_trains_publishes_and_saves(make_config, assert_nothing_left):
    config = make_config(
        *RANKS,
        "trainer.deepspeed={zero_stage: 3, zero: {stage3_param_persistence_threshold: 0}}",
        "run.steps=4",
    )
    result = asyncrl.run(config, progress=False)
    lines = read_metrics(result.run_dir / "metrics.jsonl")
    assert len(lines) == 4
    own = {"forward_backward", "optimizer", "publish"}
    check_role_times(lines, trainer_0=own, trainer_1=own | {"wait_orders"})
    assert lines[-1]["ledger/trained_groups"] == 64
    assert all(line["skipped_updates"] == line["critic/skipped_updates"] == 0 for line in lines)
    # The engines sampled from the very weights that the ranks published: at age 0 both agree.
    assert all(line.get("mismatch/abs_log_ratio", 0.0) < 1e-4 for line in lines)
    saved = AutoModelForCausalLM.from_pretrained(result.checkpoint).state_dict()
    start = AutoModelForCausalLM.from_pretrained(config.model.path).state_dict()
    assert not torch.equal(saved["model.embed_tokens.weight"], start["model.embed_tokens.weight"])
    assert_nothing_left(result.run_dir)


def test_a_dead_rank_ends_the_others_and_the_run_says_which(launch):
    run = launch(*RANKS, ENDLESS, "run.max_restarts=0")
    run.wait_for_steps(2)
    run.role("trainer-1").kill()
    assert run.end(LONG_S) == 1
    assert "trainer-1 was killed by SIGKILL" in run.output.read_text()


def test_a_failing_rank_ends_the_run_with_its_traceback(launch, monkeypatch):
    """A second rank whose DeepSpeed cannot even start."""
    run = launch(*RANKS, "trainer.deepspeed.zero={reduce_bucket_size: -7, allgather_bucket_size: nonsense}")
    assert run.end(LONG_S) == 1
    text = run.output.read_text()
    assert "trainer-" in text
    assert "allgather_bucket_size" in text
