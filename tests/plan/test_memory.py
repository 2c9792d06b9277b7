"""Memory estimates, against numbers worked out by hand."""

from dataclasses import replace

import pytest

from asyncrl.config import from_tree
from asyncrl.decoders.facts import LayerShape, ModelFacts
from asyncrl.plan.facts.models import KnownModels
from asyncrl.plan.facts.reward import RewardModelFacts
from asyncrl.plan.memory.activations import forward_bytes, head_bytes, kept_bytes, layer_backward_bytes
from asyncrl.plan.memory.estimate import estimate_memory, gpu_loads, host_bytes
from asyncrl.plan.memory.trainer import CUDA_CONTEXT_BYTES, FRAGMENTATION_SHARE, NCCL_BYTES
from asyncrl.plan.resources import assign
from asyncrl.rollout.engines.vllm.kv_cache import SPARE_KV_BLOCKS

LAYER = LayerShape(hidden_size=100, intermediate_size=300, heads=4, kv_heads=2, head_dim=25, qk_norm=True)
MODEL = ModelFacts(
    model_type="qwen3", parameters=1_000_000, vocab_size=1000, layers=2, layer=LAYER, tied_head=True,
    kv_bytes_per_token=800, max_positions=2048,
)  # fmt: skip
POLICY = KnownModels(MODEL)
CARD = 10**10
LONGEST_PROMPT = 24
LONGEST = 64
"""With the response."""
TABLE = 1000 * 100
"""Elements of the embeddings, the largest parameter."""


def vllm_of(share):
    return {"engine": "vllm", "workers": 1, "vllm": {"gpu_memory_utilization": share}}


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


def computing(parts):
    """(what is computed at the peak, and the bytes that it takes)."""
    ((name, n_bytes),) = ((name, n) for name, n in parts.items() if name.startswith("computing"))
    return name.removeprefix("computing: "), n_bytes


def test_in_float32_on_the_cpu():
    e = Estimate()
    kept = 2 * kept_bytes(LAYER, 512, 4, masked_row_tokens=LONGEST) + 2 * 4 * 512 * 25
    head = head_bytes(LAYER, 1000, 512, 1024, 4, entropy_has_gradient=False)
    norm = 512 * (4 * 101 + 2 * 4 * 100)
    assert e.parts == {
        "trainer": {
            "weights": 4_000_000,
            "float32 weights": 0,
            "gradients": 4_000_000,
            "optimizer": 8_000_000,
            "computing: logits": kept + norm + head,
        },
        "rollout": {
            "weights": 4_000_000,
            "incoming weights": 4_000_000,
            "KV cache": 10 * 64 * 800,
            "logits": 2 * 4 * 10 * 1000,
        },
        "shared weights": {"versions": 8_000_000},
    }
    trainer, rollout, shared = e.memory
    # float32 weights and both moments, and the policy as it is computed with.
    assert e.in_host["trainer"] == {"checkpoint": (12 + 4) * 1_000_000}
    snapshot = e.in_host["trainer"]["checkpoint"]
    assert e.host_bytes == trainer.total_bytes + snapshot + 3 * rollout.total_bytes + shared.total_bytes
    assert e.loads == ()


def test_rows_of_their_own_keep_states_and_what_they_go_on_from():
    hybrid = replace(MODEL, state_values=50, by_rows="it keeps a recurrent state")
    assert Estimate(models=KnownModels(hybrid)).parts["rollout"]["KV cache"] == 2 * 10 * (64 * 800 + 4 * 50)


@pytest.mark.parametrize(("settings", "kept"), [({}, 10), ({"kept_contexts": 3}, 3)])
def test_episodes_keep_contexts_beside_the_slots(settings, kept):
    many = {"episode": "a:b", **settings}
    assert Estimate(rollout=many).parts["rollout"]["KV cache"] == (10 + kept) * 64 * 800
    shared = Estimate(gpus=1, rollout=vllm_of(0.6) | many).parts["rollout"]["KV cache"]
    assert shared == ((10 + kept) * 64 // 16 + SPARE_KV_BLOCKS) * 16 * 800


def test_what_lies_on_gpus_is_not_in_host_memory_and_what_passes_through_is():
    e = Estimate(gpus=4)
    trainer, rollout, shared = e.memory
    assert e.in_host["rollout"] == {"incoming weights": 4_000_000}
    snapshot = 16 * 1_000_000
    assert e.host_bytes == shared.total_bytes + snapshot + 3 * 4_000_000
    assert [(load.gpu, load.roles, load.total_bytes) for load in e.loads] == [
        (0, ("trainer-0",), trainer.total_bytes),
        *((i + 1, (f"rollout-{i}",), rollout.total_bytes) for i in range(3)),
    ]
    mixed = Estimate(gpus=4, trainer={"device": "cpu"})
    assert mixed.host_bytes == 8_000_000 + mixed.memory[0].total_bytes + snapshot + 3 * 4_000_000


def test_the_trainers_gpu_keeps_the_version_that_engines_map():
    settings = {"weights": {"transport": "ipc"}}
    on_gpu = Estimate(gpus=4, **settings).parts
    assert on_gpu["trainer"]["version for engines"] == 4_000_000
    assert on_gpu["shared weights"] == {"versions": 0}
    assert "version for engines" not in Estimate(**settings).parts["trainer"]
    assert Estimate(**settings).parts["shared weights"] == {"versions": 4_000_000}
    assert "version for engines" not in Estimate(gpus=4).parts["trainer"]


def test_who_shares_a_gpu_adds_up():
    e = Estimate(gpus=1)
    trainer, rollout, _ = e.memory
    (load,) = e.loads
    assert load.roles == ("trainer-0", "rollout-0", "rollout-1", "rollout-2")
    assert load.total_bytes == trainer.total_bytes + 3 * rollout.total_bytes
    assert load.card_bytes == CARD


def test_in_bfloat16_with_checkpointing_on_a_gpu():
    """The inputs of all layers, and one layer computed again: no mask, since the kernel needs none."""
    large = {"gradient_checkpointing": True, "micro_batch_tokens": 10**5}
    parts = Estimate(gpus=4, model={"dtype": "bfloat16"}, trainer=large).parts["trainer"]
    assert parts["weights"] == 2_000_000
    assert parts["float32 weights"] == parts["gradients"] == 4_000_000  # summed up in float32
    inputs = 2 * 2 * 10**5 * 100 + 2 * 2 * 10**5 * 25
    layer = kept_bytes(LAYER, 10**5, 2) + layer_backward_bytes(LAYER, 10**5, 2)
    head_gradient = 2 * TABLE  # it is the embeddings' as well, whose part comes last
    assert computing(parts) == ("layers", inputs + layer + head_gradient)
    assert parts["fragmentation"] == int(FRAGMENTATION_SHARE * (inputs + layer + head_gradient))
    masked = Estimate(
        gpus=4, model={"dtype": "bfloat16", "attn_implementation": "sdpa"}, trainer=large
    ).parts["trainer"]
    more = kept_bytes(LAYER, 10**5, 2, LONGEST) - kept_bytes(LAYER, 10**5, 2)
    assert computing(masked)[1] == computing(parts)[1] + more


@pytest.mark.parametrize(
    ("stage", "weights", "gradients", "optimizer", "buckets"),
    [
        (0, 2_000_000, 4_000_000, 8_000_000, 0),
        (1, 2_000_000, 4_000_000, 2_000_000, 4 * 500),
        (2, 2_000_000, 1_000_000, 2_000_000, 2 * 2 * 500),  # in the model's dtype, one fills and one goes
        (3, 500_000, 1_000_000, 2_000_000, 4 * 500),  # in the dtype that is sent
    ],
)
def test_ranks_share_out_what_their_zero_stage_says(stage, weights, gradients, optimizer, buckets):
    trainer = ranks(stage, zero={"reduce_bucket_size": 500})
    e = Estimate(gpus=7, model={"dtype": "bfloat16"}, trainer=trainer)
    trainer = e.parts["trainer"]
    assert (trainer["weights"], trainer["gradients"], trainer["optimizer"]) == (weights, gradients, optimizer)
    assert trainer["float32 weights"] == optimizer / 2
    assert trainer.get("gathered weights", 0) == (2_000_000 if stage == 3 else 0)
    assert trainer.get("reduce buckets", 0) == buckets
    assert trainer["NCCL"] == NCCL_BYTES
    assert [load.roles for load in e.loads[:5]] == [*((f"trainer-{i}",) for i in range(4)), ("rollout-0",)]


def test_an_update_counts_where_it_takes_more_than_the_passes():
    few = {"ranks": 2, "micro_batch_tokens": 64, "logit_chunk_tokens": 1}
    trainer = ranks(3, zero={"reduce_bucket_size": 500}) | few
    e = Estimate(gpus=7, model={"dtype": "bfloat16"}, trainer=trainer)
    assert computing(e.parts["trainer"]) == ("update", 4 * 500_000)  # the float32 gradient, laid out anew


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
        "checkpoint": 14 * 250_000,
    }
    moved = 1_000_000 + 2_000_000 + 500_000
    assert e.memory[0].certain_bytes == plain.memory[0].certain_bytes - moved
    assert e.host_bytes == plain.host_bytes + 4 * (moved + 1_000_000)


def test_a_large_model_that_is_loaded_takes_more_host_memory_than_a_share_of_its_checkpoint():
    e = Estimate(gpus=12, trainer=ranks(2) | {"ranks": 8})
    assert e.in_host["trainer"] == {"loading": 4_000_000}


def test_vllm_takes_its_share_of_each_gpu():
    e = Estimate(gpus=3, rollout=vllm_of(0.6) | {"tensor_parallel_size": 2})
    parts = e.parts["rollout"]
    assert parts["weights"] == 2_000_000
    assert parts["KV cache"] == 0.6 * CARD - 2_000_000 - parts["workspace"]
    assert e.in_host["rollout"] == {"incoming weights": 8_000_000}  # each of its two ranks stages all
    assert [load.total_bytes for load in e.loads[1:]] == [0.6 * CARD, 0.6 * CARD]


def test_on_a_gpu_that_others_use_vllm_takes_no_more_than_it_can_fill():
    """What it is told at its launch comes from the same functions."""
    e = Estimate(gpus=1, rollout=vllm_of(0.6))
    blocks = 10 * 64 // 16 + SPARE_KV_BLOCKS
    assert e.parts["rollout"]["KV cache"] == blocks * 16 * 800


def test_a_process_on_a_gpu_has_a_cuda_context_of_its_own():
    sections = {"model": {"attn_implementation": "sdpa"}}
    on_gpu, on_cpu = Estimate(gpus=4, **sections), Estimate(**sections)
    assert on_gpu.memory[0].certain_bytes - on_cpu.memory[0].certain_bytes == CUDA_CONTEXT_BYTES


def test_critic_and_reference_lie_on_the_trainer_s_ranks():
    models = KnownModels(MODEL, critic=replace(MODEL, parameters=500_000), reference=MODEL)
    trainer = ranks(2, offload_optimizer=True, zero={"reduce_bucket_size": 500})
    alone = Estimate(gpus=7, trainer=trainer)
    e = Estimate(
        gpus=7,
        models=models,
        trainer=trainer,
        objective={"advantage": "gae"},
        critic={},
        reference={"offload": True},
    )
    # Whole weights, a quarter of the gradients, and two buckets.
    assert e.parts["trainer"]["critic"] == 2_000_000 + 500_000 + 2 * 4 * 500
    assert "reference" not in e.parts["trainer"]
    assert e.in_host["trainer"]["critic"] == (4 + 8 + 4) * 500_000 / 4
    assert e.in_host["trainer"]["reference"] == 4_000_000
    assert e.in_host["trainer"]["checkpoint"] == (12 * 1_500_000 + 4 * 1_000_000) / 4
    added = e.parts["trainer"]["critic"]
    assert e.memory[0].certain_bytes == alone.memory[0].certain_bytes + added


def test_a_reference_in_host_memory_comes_back_to_compute():
    settings = {"gpus": 4, "models": KnownModels(MODEL, reference=MODEL)}
    few = {"micro_batch_tokens": 1, "logit_chunk_tokens": 1}
    e = Estimate(reference={"offload": True}, trainer=few, **settings)
    what, n_bytes = computing(e.parts["trainer"])
    assert what == "reference"
    assert n_bytes > 4_000_000
    stays = Estimate(reference={}, trainer=few, **settings)
    assert stays.parts["trainer"]["reference"] == 4_000_000


def test_a_reward_model_has_its_weights_and_one_layer_s_activations():
    judge = RewardModelFacts(2_000_000, 1000, LAYER, 2048, tokenizer=None)
    models = [{"path": "x", "batch_tokens": 100}, {"path": "y"}]
    e = Estimate(gpus=8, models=KnownModels(MODEL, reward=(judge, None)), reward={"models": models})
    assert e.parts["reward-0"] == {
        "weights": 4_000_000,
        "activations": forward_bytes(LAYER, 100, 2, LONGEST),
        "CUDA": CUDA_CONTEXT_BYTES,
    }
    assert e.in_host["reward-0"] == {"loading": 4_000_000}
    assert [load.bytes for load in e.loads[-2:]] == [(sum(e.parts["reward-0"].values()),), (None,)]
    assert e.host_bytes is None


def test_without_the_policy_only_vllm_s_share_is_known():
    e = Estimate(gpus=2, models=KnownModels(None), rollout={"engine": "vllm", "workers": 1})
    assert [load.bytes for load in e.loads] == [(None,), (int(0.9 * CARD),)]


def test_a_critic_of_unknown_size_leaves_the_trainer_unknown():
    e = Estimate(gpus=2, rollout={"workers": 1}, objective={"advantage": "gae"}, critic={})
    assert [load.bytes[0] is None for load in e.loads] == [True, False]


def test_what_is_paced_holds_no_model():
    e = Estimate(rollout={"engine": "paced"}, trainer={"backend": "paced"})
    assert [m.total_bytes for m in e.memory] == [0, 0, 0]


ADAPTED = replace(MODEL, linear_layers={"layers.0.q_proj": (100, 60), "layers.0.up_proj": (300, 100)})


def test_an_adapter_is_all_that_is_trained_and_the_reference_is_no_model():
    lora = {"lora": {"rank": 2, "targets": ["q_proj"]}}
    settings = {"models": KnownModels(ADAPTED, reference=ADAPTED), "reference": {}}
    adapter, base = 2 * (100 + 60), 100 * 60
    e = Estimate(trainer=lora, **settings)
    kept = {name: n for name, n in e.parts["trainer"].items() if not name.startswith("computing")}
    assert kept == {"weights": 4_000_000, "adapter": (4 + 4 + 8) * adapter, "base of the adapter": 4 * base}
    assert e.in_host["trainer"] == {"checkpoint": (12 + 4) * adapter}
    assert e.in_host["rollout"] == {"base of the adapter": 4_000_000}
    assert e.parts["shared weights"] == {"versions": 2 * 4 * adapter}
    on_gpu = Estimate(gpus=4, trainer=lora, model={"dtype": "bfloat16"}, **settings)
    assert on_gpu.parts["trainer"]["adapter"] == (2 + 4 + 4 + 8) * adapter
    assert on_gpu.in_host["trainer"] == {"base of the adapter": 2 * base, "loading": 2_000_000}
    whole = Estimate(gpus=4, model={"dtype": "bfloat16"}, **settings)
    assert computing(on_gpu.parts["trainer"])[1] < computing(whole.parts["trainer"])[1]
    # Four ranks share the base, and what is computed with; two by two they have another copy of that.
    zero_3 = ranks(3, hpz_partition_size=2, zero={"reduce_bucket_size": 0}) | lora
    shared = Estimate(gpus=7, trainer=zero_3, model={"dtype": "bfloat16"}, **settings)
    parts, in_host = shared.parts["trainer"], shared.in_host["trainer"]
    assert (parts["weights"], parts["weights of the node"]) == (2_000_000 / 4, 2_000_000 / 2)
    assert parts["gathered weights"] == 2_000_000
    assert parts["adapter"] == (2 + 4 + 4 + 8) * adapter / 4 + 2 * adapter / 2 + 2 * adapter
    assert in_host["base of the adapter"] == 2 * base / 4
    assert parts["NCCL"] == NCCL_BYTES
    broadcast = {"weights": {"transport": "collective"}} | settings
    usual = Estimate(gpus=7, trainer=ranks(3) | lora, model={"dtype": "bfloat16"}, **broadcast)
    assert usual.parts["trainer"]["NCCL"] == 2 * NCCL_BYTES
    # Its processes are given whole versions, one at a time.
    vllm = Estimate(rollout={"engine": "vllm"}, trainer=lora, **settings)
    assert vllm.parts["shared weights"] == {"versions": 2 * 4 * adapter + 3 * 4_000_000}
    assert Estimate(trainer={"lora": {"rank": 2}}, **settings).parts["trainer"]["adapter"] == 16 * (
        adapter + 2 * (300 + 100)
    )
