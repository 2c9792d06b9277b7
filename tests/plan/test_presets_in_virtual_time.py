"""Every preset for GPUs, from its start over twenty steps and a checkpoint at the predicted speeds, on a
virtual clock: nothing healthy is declared stalled, hung or late."""

import statistics
from functools import cache
from pathlib import Path

import pytest
from transformers import Qwen3Config
from virtual_run import Declared, VirtualRun

from asyncrl.config import load
from asyncrl.plan.facts.model import FoundModel, ModelSource, model_facts
from asyncrl.plan.facts.models import KnownModels
from asyncrl.plan.facts.reward import reward_model_facts
from asyncrl.plan.facts.shapes import known_model
from asyncrl.plan.pace import predict
from asyncrl.plan.resources import assign
from asyncrl.trainer.backends.deepspeed.group import ORDER_TIMEOUT_S

CONFIGS = Path(__file__).parents[2] / "configs"
GPUS = {"gpu-1": 1, "gpu-2": 2, "gpu-4": 4, "gpu-8": 8, "grlo": 8, "grlo-4gpu": 4, "grlo-rlvr": 8}
STEPS = 20


@cache
def facts(size):
    hidden, intermediate, layers, heads = {"1.7B": (2048, 6144, 28, 16), "4B": (2560, 9728, 36, 32)}[size]
    shape = Qwen3Config(
        vocab_size=151_936, hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=8, head_dim=128, tie_word_embeddings=True,
    )  # fmt: skip
    return model_facts(FoundModel(ModelSource("model.path", size, False, ""), None, shape), "bfloat16")


@cache
def skywork():
    found = known_model("reward.models.0.path", "Skywork/Skywork-Reward-V2-Llama-3.1-8B")
    return reward_model_facts(found, None)


def virtual(preset, mean_length, lengths, *overrides, **options):
    gpus = GPUS[preset]
    config = load(CONFIGS / f"{preset}.yaml", overrides)
    policy = facts("1.7B" if "1.7B" in config.model.path else "4B")
    critic = policy if config.critic is not None else None
    models = KnownModels(policy, critic, None, (skywork(),) * len(config.reward.models))
    placement = assign(config, gpus, gpus)
    pace = predict(config, models, placement, mean_length(config))
    return VirtualRun(config, placement, pace, lengths(config), **options)


def mixed(preset, *overrides, **options):
    """Responses of all lengths."""
    return virtual(
        preset,
        lambda c: c.rollout.max_new_tokens / 2,
        lambda c: lambda random: int(random.integers(1, c.rollout.max_new_tokens, endpoint=True)),
        *overrides,
        **options,
    )


def full(preset, *overrides, **options):
    """Responses of full length alone."""
    return virtual(
        preset,
        lambda c: c.rollout.max_new_tokens,
        lambda c: lambda _: c.rollout.max_new_tokens,
        *overrides,
        **options,
    )


@cache
def finished(lengths, preset):
    """After so many steps, however little the budget."""
    run = lengths(preset, "run.gpu_hours=null", "checkpoint.every_steps=10")
    run.run(STEPS)
    return run


@pytest.mark.slow
@pytest.mark.parametrize("preset", GPUS)
@pytest.mark.parametrize("lengths", [mixed, full])
def test_nothing_is_declared_stalled_hung_or_late(preset, lengths):
    run = finished(lengths, preset)
    config = run.config
    assert len(run.step_s) == run.coordinator.version == STEPS
    assert max(run.applied_waits_s) < config.weights.ack_timeout_s
    assert run.pace.load_s < config.rollout.vllm.answer_timeout_s
    for model, score_s in zip(config.reward.models, run.pace.score_s.values(), strict=True):
        tokens = config.trainer.batch_groups * (run.pace.prompt_tokens + run.pace.response_tokens)
        assert score_s * model.batch_tokens / tokens < model.timeout_s / 2
    # Other ranks wait for an order as long as rank 0 waits for a batch.
    assert max(run.order_waits_s) < ORDER_TIMEOUT_S


@pytest.mark.parametrize("preset", GPUS)
def test_the_default_patience_is_enough(preset):
    full(preset, "run.gpu_hours=null", "run.stall_s=300").run(3)


@pytest.mark.parametrize("preset", ["gpu-4", "gpu-8"])
def test_without_progress_inside_a_step_healthy_ones_would_be_stalls(preset):
    with pytest.raises(Declared, match=r"no training step has ended for \d+ s \(run.stall_s=300\)"):
        full(preset, "run.stall_s=300", shows_progress=False).run(STEPS)


@pytest.mark.parametrize("preset", [name for name in GPUS if name != "grlo-rlvr"])
def test_steps_take_what_is_predicted(preset):
    run = finished(mixed, preset)
    assert statistics.mean(run.step_s[5:]) == pytest.approx(run.pace.step_s, rel=0.2)


def test_the_budget_expects_what_is_predicted():
    run = mixed("grlo", "run.gpu_hours=1000")
    run.run(STEPS)
    metrics = dict(run.budget.metrics(STEPS))
    assert metrics["budget/expected_gpu_hours"] == pytest.approx(run.pace.gpu_hours(60), rel=0.2)
