"""Memory estimates, against numbers worked out by hand."""

from dataclasses import replace

import pytest

from asyncrl.config import from_tree
from asyncrl.runtime.memory import CUDA_CONTEXT_BYTES, estimate_memory, gpu_loads, host_bytes
from asyncrl.runtime.model_facts import ModelFacts
from asyncrl.runtime.models import KnownModels
from asyncrl.runtime.resources import assign
from asyncrl.runtime.reward_facts import RewardModelFacts

MODEL = ModelFacts(
    model_type="qwen3", parameters=1_000_000, vocab_size=1000, hidden_size=100, layers=2,
    kv_bytes_per_token=800, max_positions=2048,
)  # fmt: skip
POLICY = KnownModels(MODEL)
CARD = 10**9
LONGEST_PROMPT = 24


class Estimate:
    def __init__(self, *, gpus=0, models=POLICY, **sections):
        tree = {
            "model": {"path": "m"},
            "data": {"path": "d"},
            "reward": {"functions": [{"function": "a:b"}]},
            "rollout": {"workers": 3, "slots": 10, "max_new_tokens": 40},
            "trainer": {"micro_batch_tokens": 512},
        }
        for name, settings in sections.items():
            tree[name] = {**tree.get(name, {}), **settings}
        config = from_tree(tree)
        self.placement = assign(config, None, gpus)
        self.memory = estimate_memory(config, self.placement, models, LONGEST_PROMPT, (CARD,) * gpus)
        self.parts = {m.kind: m.parts for m in self.memory}
        self.in_host = {m.kind: m.host_parts for m in self.memory}
        self.host_bytes = host_bytes(self.placement, self.memory)
        self.loads = gpu_loads(self.placement, self.memory, (CARD,) * gpus)


def ranks(stage, **zero):
    return {"backend": "deepspeed", "ranks": 4, "deepspeed": {"zero_stage": stage, **zero}}


def test_in_float32_on_the_cpu():
    e = Estimate()
    assert e.parts == {
        "trainer": {
            "weights": 4_000_000,
            "float32 weights": 0,
            "gradients": 4_000_000,
            "optimizer": 8_000_000,
            "activations": 17 * 2 * 512 * 100 * 4,
            "logits": 2 * 4 * 1024 * 1000,
        },
        "rollout": {
            "weights": 4_000_000,
            "incoming weights": 4_000_000,
            "KV cache": 10 * 64 * 800,
            "logits": 2 * 4 * 10 * 1000,
        },
        "shared weights": {"two versions": 8_000_000},
    }
    trainer, rollout, shared = e.memory
    assert e.host_bytes == trainer.total_bytes + 3 * rollout.total_bytes + shared.total_bytes
    assert e.loads == ()


def test_what_lies_on_gpus_is_not_in_host_memory_and_what_passes_through_is():
    e = Estimate(gpus=4)
    trainer, rollout, shared = e.memory
    assert e.in_host["rollout"] == {"incoming weights": 4_000_000}
    assert e.host_bytes == shared.total_bytes + 3 * 4_000_000
    assert [(load.gpu, load.roles, load.total_bytes) for load in e.loads] == [
        (0, ("trainer-0",), trainer.total_bytes),
        *((i + 1, (f"rollout-{i}",), rollout.total_bytes) for i in range(3)),
    ]
    mixed = Estimate(gpus=4, trainer={"device": "cpu"})
    assert mixed.host_bytes == 8_000_000 + mixed.memory[0].total_bytes + 3 * 4_000_000


def test_who_shares_a_gpu_adds_up():
    e = Estimate(gpus=1)
    trainer, rollout, _ = e.memory
    (load,) = e.loads
    assert load.roles == ("trainer-0", "rollout-0", "rollout-1", "rollout-2")
    assert load.total_bytes == trainer.total_bytes + 3 * rollout.total_bytes
    assert load.card_bytes == CARD


def test_in_bfloat16_with_checkpointing():
    trainer = Estimate(model={"dtype": "bfloat16"}, trainer={"gradient_checkpointing": True}).parts["trainer"]
    assert trainer["weights"] == 2_000_000
    assert trainer["float32 weights"] == trainer["gradients"] == 4_000_000  # summed up in float32
    assert trainer["activations"] == (2 + 17) * 512 * 100 * 2


@pytest.mark.parametrize(
    ("stage", "weights", "gradients", "optimizer"),
    [
        (0, 2_000_000, 4_000_000, 8_000_000),
        (1, 2_000_000, 2_000_000, 2_000_000),
        (2, 2_000_000, 500_000, 2_000_000),
        (3, 500_000, 500_000, 2_000_000),
    ],
)
def test_ranks_share_out_what_their_zero_stage_says(stage, weights, gradients, optimizer):
    e = Estimate(gpus=7, model={"dtype": "bfloat16"}, trainer=ranks(stage))
    trainer = e.parts["trainer"]
    assert (trainer["weights"], trainer["gradients"], trainer["optimizer"]) == (weights, gradients, optimizer)
    assert trainer["float32 weights"] == optimizer / 2
    assert trainer.get("gathered weights", 0) == (2_000_000 if stage == 3 else 0)
    assert [load.roles for load in e.loads[:5]] == [*((f"trainer-{i}",) for i in range(4)), ("rollout-0",)]


def test_what_is_offloaded_moves_to_host_memory():
    plain = Estimate(gpus=7, model={"dtype": "bfloat16"}, trainer=ranks(3))
    e = Estimate(
        gpus=7,
        model={"dtype": "bfloat16"},
        trainer=ranks(3, offload_optimizer=True, offload_parameters=True),
    )
    assert e.in_host["trainer"] == {
        "float32 weights": 1_000_000,
        "optimizer": 2_000_000,
        "float32 gradients": 1_000_000,
        "weights": 500_000,
    }
    moved = 1_000_000 + 2_000_000 + 500_000
    assert e.memory[0].total_bytes == plain.memory[0].total_bytes - moved
    assert e.host_bytes == plain.host_bytes + 4 * (moved + 1_000_000)


def test_vllm_takes_its_share_of_each_gpu():
    vllm = {
        "engine": "vllm",
        "workers": 1,
        "tensor_parallel_size": 2,
        "vllm": {"gpu_memory_utilization": 0.6},
    }
    e = Estimate(gpus=3, rollout=vllm)
    assert e.parts["rollout"] == {"weights": 2_000_000, "KV cache and graphs": 598_000_000}
    assert e.in_host["rollout"] == {"incoming weights": 8_000_000}  # each of its two ranks stages all
    assert [load.total_bytes for load in e.loads[1:]] == [600_000_000, 600_000_000]


def test_a_process_on_a_gpu_has_a_cuda_context_of_its_own():
    on_gpu, on_cpu = Estimate(gpus=4).memory[0], Estimate().memory[0]
    assert on_gpu.total_bytes - on_cpu.total_bytes == CUDA_CONTEXT_BYTES


def test_critic_and_reference_lie_on_the_trainer_s_ranks():
    models = KnownModels(MODEL, critic=replace(MODEL, parameters=500_000), reference=MODEL)
    alone = Estimate(gpus=7, trainer=ranks(2, offload_optimizer=True))
    e = Estimate(
        gpus=7,
        models=models,
        trainer=ranks(2, offload_optimizer=True),
        objective={"advantage": "gae"},
        critic={},
        reference={"offload": True},
    )
    assert e.parts["trainer"]["critic"] == 2_000_000 + 500_000  # whole weights, a quarter of the gradients
    assert e.parts["trainer"]["reference"] == 0
    assert e.in_host["trainer"]["critic"] == (8 + 4) * 500_000 / 4
    assert e.in_host["trainer"]["reference"] == 4_000_000
    added = e.parts["trainer"]["critic"]
    assert e.memory[0].total_bytes == alone.memory[0].total_bytes + added


def test_a_reward_model_has_its_weights_and_one_layer_s_activations():
    judge = RewardModelFacts(2_000_000, 1000, 200, 2048, tokenizer=None)
    models = [{"path": "x", "batch_tokens": 100}, {"path": "y"}]
    e = Estimate(gpus=8, models=KnownModels(MODEL, reward=(judge, None)), reward={"models": models})
    assert e.parts["reward-0"] == {
        "weights": 4_000_000,
        "activations": 17 * 100 * 200 * 2,
        "CUDA": CUDA_CONTEXT_BYTES,
    }
    assert [load.bytes for load in e.loads[-2:]] == [(sum(e.parts["reward-0"].values()),), (None,)]
    assert e.host_bytes is None


def test_without_the_policy_only_vllm_s_share_is_known():
    e = Estimate(gpus=2, models=KnownModels(None), rollout={"engine": "vllm", "workers": 1})
    assert [load.bytes for load in e.loads] == [(None,), (900_000_000,)]


def test_a_critic_of_unknown_size_leaves_the_trainer_unknown():
    e = Estimate(gpus=2, rollout={"workers": 1}, objective={"advantage": "gae"}, critic={})
    assert [load.bytes[0] is None for load in e.loads] == [True, False]


def test_what_is_paced_holds_no_model():
    e = Estimate(rollout={"engine": "paced"}, trainer={"backend": "paced"})
    assert [m.total_bytes for m in e.memory] == [0, 0, 0]
