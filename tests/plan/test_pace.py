"""The time model: its published figures, and what follows from them, worked out by hand."""

import dataclasses
from pathlib import Path

import pytest

from asyncrl.config import from_tree, load
from asyncrl.decoders.facts import LayerShape, ModelFacts
from asyncrl.plan.facts.model import (
    model_facts,
)
from asyncrl.plan.facts.models import KnownModels
from asyncrl.plan.facts.reward import reward_model_facts
from asyncrl.plan.facts.shapes import known_model
from asyncrl.plan.pace import (
    DISK_BYTES_PER_S,
    TRAINER_START_S,
    TRAINING_FLOPS_PER_S,
    longest_affordable,
    predict,
    warnings,
)
from asyncrl.plan.resources import assign

CONFIGS = Path(__file__).parents[2] / "configs"
OPTIMISTIC_FLOPS_PER_S = 4e14


@pytest.fixture(scope="module")
def grlo_models():
    policy = model_facts(known_model("model.path", "Qwen/Qwen3-4B-Base"), "bfloat16")
    skywork = known_model("reward.models.0.path", "Skywork/Skywork-Reward-V2-Llama-3.1-8B")
    return KnownModels(policy, policy, None, (reward_model_facts(skywork, None),))


def grlo(models, trainers, engines, *overrides):
    """The pace of GRLO on eight GPUs, split like this, by mean lengths of responses and prompts."""
    split = [f"trainer.ranks={trainers}", f"rollout.workers={engines}", *overrides]
    config = load(CONFIGS / "grlo.yaml", split)
    placement = assign(config, 8, 8)
    return lambda response, prompt=None: predict(config, models, placement, response, prompt)


def test_a_token_of_policy_and_critic_takes_220_microseconds(grlo_models):
    pace = grlo(grlo_models, 4, 3)(1536, 256)
    tokens = 1024 * (1536 + 256)
    assert 4 * pace.train_s / tokens == pytest.approx(220e-6, rel=0.1)


def test_a_step_of_full_length_takes_211_seconds_at_an_optimistic_rate(grlo_models):
    pace = grlo(grlo_models, 4, 3)(3072, 1024)
    assert pace.train_s * TRAINING_FLOPS_PER_S / OPTIMISTIC_FLOPS_PER_S == pytest.approx(211, rel=0.15)


def test_a_micro_batch_is_a_matter_of_seconds_and_a_checkpoint_of_a_minute(grlo_models):
    pace = grlo(grlo_models, 4, 3)(1536)
    assert 1 < pace.micro_batch_s < 5
    assert 40 <= pace.snapshot_s <= 90
    assert 60 < pace.start_s < 300


def test_four_trainers_leave_three_engines_idle_more_than_half_of_the_time(grlo_models):
    pace = grlo(grlo_models, 4, 3)(1536)
    assert pace.bottleneck == {"trainer"}
    assert pace.idle["rollout"] > 0.5
    assert pace.idle["trainer"] == 0
    assert pace.step_s == pace.busy_s["trainer"]


def test_other_splits_leave_less_idle(grlo_models):
    at_first = grlo(grlo_models, 4, 3)
    six = grlo(grlo_models, 6, 2, "reward.models.0.share_gpu_with=rollout-0")
    five = grlo(grlo_models, 5, 2)
    assert six(768).idle_gpus < at_first(768).idle_gpus
    assert five(1536).idle_gpus < at_first(1536).idle_gpus
    # A reward model of 8 billion parameters on an engine's GPU takes its share of every long response.
    assert six(3072).bottleneck == {"rollout", "reward-0"}
    assert six(3072).step_s > five(3072).step_s


def test_the_mean_length_at_which_a_budget_stops_being_enough(grlo_models):
    pace_at = grlo(grlo_models, 4, 3)
    config = load(CONFIGS / "grlo.yaml")
    longest = longest_affordable(pace_at, config)
    assert 0 < longest < 3072
    assert pace_at(longest).gpu_hours(60) <= 22.7 < pace_at(longest + 2).gpu_hours(60)
    assert longest_affordable(pace_at, load(CONFIGS / "grlo.yaml", ["run.gpu_hours=1000"])) is None
    assert longest_affordable(pace_at, load(CONFIGS / "grlo.yaml", ["run.gpu_hours=null"])) is None
    assert longest_affordable(pace_at, load(CONFIGS / "grlo.yaml", ["run.gpu_hours=0.01"])) == 0


LAYER = LayerShape(hidden_size=1000, intermediate_size=3000, heads=10, kv_heads=5, head_dim=100, qk_norm=True)
MODEL = ModelFacts(
    model_type="qwen3", parameters=10**9, vocab_size=10**5, layers=10, layer=LAYER, tied_head=True,
    kv_bytes_per_token=10**5, max_positions=None,
)  # fmt: skip


def pace(*overrides, models=None, gpus=2, response=1000.0, prompt=200.0):
    tree = {
        "model": {"path": "m", "dtype": "bfloat16"},
        "data": {"path": "d", "max_prompt_tokens": 400},
        "reward": {"functions": [{"function": "a:b"}]},
        "rollout": {"engine": "vllm", "slots": 50, "group_size": 4, "max_new_tokens": 2000},
        "trainer": {"batch_groups": 10},
    }
    config = from_tree(tree, overrides=overrides)
    placement = assign(config, None, gpus)
    return predict(config, models or KnownModels(MODEL), placement, response, prompt)


def test_training_counts_every_pass_over_every_token_that_is_computed():
    attention = 4 * 1000 * 10 * 700  # 4 H a layer and token seen: the prompt and half of the response
    forward = 2 * 10**9 + attention
    tokens = 40 * 1000 + 10 * 200  # a prompt once for its group
    assert pace().train_s == pytest.approx(tokens * 3 * forward / TRAINING_FLOPS_PER_S)
    each_alone = pace("trainer.share_prompts=false").train_s
    assert each_alone == pytest.approx(40 * 1200 * 3 * forward / TRAINING_FLOPS_PER_S)
    passes = {
        ("trainer.gradient_checkpointing=true",): 4,
        ("trainer.mini_batches=2",): 4,
        ("trainer.mini_batches=2", "objective.proximal=loglinear"): 3,
        ("trainer.mini_batches=2", "objective.proximal=ewma"): 4,
        ("trainer.mini_batches=2", "objective.policy_loss=ppo"): 3,
        ("objective.policy_loss=m2po",): 4,
        ("trainer.mini_batches=2", "objective.policy_loss=clip_cov"): 5,
        ("objective.advantage=opob",): 4,
        ("objective.advantage=otb",): 4,
        ("objective.entropy_share=0.2",): 4,
        ("objective.step_size=vcpo",): 4,
    }
    for overrides, times in passes.items():
        assert pace(*overrides).train_s == pytest.approx(pace().train_s * times / 3), overrides


def test_critic_and_reference_compute_too():
    both = KnownModels(MODEL, critic=MODEL, reference=MODEL)
    reference = pace("reference={}", models=both).train_s
    assert reference == pytest.approx(pace().train_s * 4 / 3)
    teacher = pace("teacher={path: t}", models=KnownModels(MODEL, teacher=MODEL)).train_s
    assert teacher == pytest.approx(pace().train_s * 5 / 3)  # and the policy, at the step's start
    critic = pace("critic={}", "objective.advantage=gae", models=both).train_s
    # Three passes of training and one for the values; its head is no vocabulary.
    assert pace().train_s * 6.5 / 3 < critic < pace().train_s * 7 / 3


def test_decoding_is_bound_by_what_is_read():
    weights_s, seen = 2e9 / 2.5e12, 700
    step_s = weights_s + 50 * seen * 10**5 / 2.5e12 + 0.003
    prefill_s = 10 * 200 * 2e9 / TRAINING_FLOPS_PER_S
    assert pace().decoding == 50
    assert pace().decode_step_s == pytest.approx(step_s)
    assert pace().generate_s == pytest.approx(40 * 1000 / 50 * step_s + prefill_s)
    assert pace("rollout.workers=2", gpus=3).generate_s == pytest.approx(pace().generate_s / 2)


def test_no_more_decode_than_are_outstanding_or_have_room():
    assert pace("rollout.slots=500").decoding == 200  # (4 + 1) steps of 40 responses
    room = 0.9 * 80e9 - 2e9
    assert pace("rollout.slots=5000", "trainer.batch_groups=1000").decoding == int(room / (700 * 10**5))


def test_without_staleness_the_sides_take_turns_and_the_longest_response_is_waited_for():
    asynchronous, synchronous = pace(), pace("staleness.max_staleness=0")
    assert asynchronous.step_s == max(asynchronous.busy_s.values())
    assert synchronous.generate_s > asynchronous.generate_s
    expected = synchronous.generate_s + synchronous.busy_s["trainer"] + synchronous.load_s
    assert synchronous.step_s == pytest.approx(expected)


def test_what_shares_a_gpu_takes_turns():
    alone = pace(gpus=1)
    assert alone.step_s == pytest.approx(sum(alone.busy_s.values()))
    assert alone.bottleneck == {"trainer", "rollout"}
    assert alone.idle == {"trainer": 0, "rollout": 0}
    assert alone.gpu_hours(10) == alone.hours(10)


def test_who_takes_turns_starts_one_after_the_other():
    turns = "placement.colocate=turns", "rollout.kv_on_update=recompute"
    p, one = pace(*turns, gpus=1), pace("placement.colocate=always", gpus=1)
    moved_s, trainer_s = p.load_s - one.load_s, TRAINER_START_S + 2e9 / DISK_BYTES_PER_S
    assert p.start_s - moved_s == pytest.approx(one.start_s + trainer_s)  # an engine's start is the longer


def test_a_run_takes_its_start_its_first_step_and_the_others():
    p = pace()
    assert p.hours(100) * 3600 == pytest.approx(p.start_s + p.first_step_s + 99 * p.step_s)
    assert p.gpu_hours(100) == 2 * p.hours(100)
    assert p.first_step_s > p.step_s


def test_a_deadline_without_room_is_warned_of_with_one_that_has_room(grlo_models):
    config = load(CONFIGS / "grlo.yaml", ["run.stall_s=300", "run.start_s=600"])
    expected = grlo(grlo_models, 4, 3)(3072)
    assert not list(warnings(config, expected))
    slow = dataclasses.replace(expected, train_s=1000.0)  # on other cards
    (warning,) = warnings(config, slow)
    assert "run.stall_s=300: with responses of full length a step is expected to take about 1006 s" in warning
    assert warning.endswith("set run.stall_s=360 or more")
    assert not list(warnings(load(CONFIGS / "grlo.yaml", ["run.stall_s=360"]), slow))
    large = dataclasses.replace(expected, snapshot_s=400.0, start_s=301.0)  # models
    silent, start = warnings(config, large)
    assert "training to be silent for 403 s" in silent
    assert silent.endswith("set run.stall_s=840 or more")
    assert start == (
        "run.start_s=600: the start is expected to take about 301 s (estimated); set run.start_s=660 or more"
    )


@pytest.mark.parametrize(
    ("overrides", "gpus"),
    [
        ((), 0),
        (("trainer.device=cpu",), 2),
        (("rollout.engine=paced",), 2),
        (("critic={}", "objective.advantage=gae"), 2),
        (("run.mode=inline", "rollout.engine=torch"), 2),
    ],
)
def test_what_cannot_be_told_is_not(overrides, gpus):
    assert pace(*overrides, gpus=gpus) is None


def test_nothing_is_told_of_models_whose_sizes_are_not_known():
    assert pace(models=KnownModels(None)) is None
    unscored = ("reward.models=[{path: r, device: auto}]",)
    assert pace(*unscored, models=KnownModels(MODEL, reward=(None,)), gpus=3) is None
