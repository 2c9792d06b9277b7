"""What is said of GPUs that are too small, or taken by others."""

import pytest

from asyncrl.config import from_tree
from asyncrl.decoders.facts import LayerShape, ModelFacts
from asyncrl.errors import ConfigError
from asyncrl.plan.checks import gpu as gpu_checks
from asyncrl.plan.checks.settings import mapped_gpus
from asyncrl.plan.facts.models import KnownModels
from asyncrl.plan.outline import outline
from asyncrl.plan.resources import assign
from asyncrl.rollout.engines.vllm.kv_cache import GRAPHS_AND_LIBRARIES_BYTES

LAYER = LayerShape(
    hidden_size=1000, intermediate_size=3000, heads=10, kv_heads=5, head_dim=100, qk_norm=False
)
MODEL = ModelFacts(
    model_type="qwen3", parameters=10**9, vocab_size=1000, layers=10, layer=LAYER, tied_head=True,
    kv_bytes_per_token=10**5, max_positions=2048,
)  # fmt: skip
CARD = 40 * 10**9


def planned(gpus, card_bytes=CARD, model=MODEL, **sections):
    """A trainer of about 18 GB, and engines of vLLM."""
    tree = {
        "model": {"path": "m", "dtype": "bfloat16"},
        "data": {"path": "d"},
        "reward": {"functions": [{"function": "a:b"}]},
        "rollout": {"engine": "vllm", "slots": 1024},
        "trainer": {"gradient_checkpointing": True},
    }
    for name, settings in sections.items():
        tree[name] = {**tree.get(name, {}), **settings}
    config = from_tree(tree)
    placement = assign(config, gpus, gpus)
    implied = outline(config, placement, KnownModels(model), 100, 100, (card_bytes,) * gpus)
    return config, placement, implied


def share(value):
    return {"vllm": {"gpu_memory_utilization": value}}


def test_versions_on_the_trainers_gpu_are_refused_for_engines_on_the_cpu():
    for transport, device in ("shm", "cpu"), ("ipc", "auto"):
        config, placement, _ = planned(2, weights={"transport": transport}, rollout={"device": device})
        mapped_gpus(config, placement)
    config, placement, _ = planned(2, weights={"transport": "ipc"}, rollout={"device": "cpu"})
    with pytest.raises(ConfigError, match=r"weights.transport=ipc: .*rollout.engine=vllm\) have none .*=shm"):
        mapped_gpus(config, placement)
    mapped_gpus(config, assign(config, 0, 0))


def refusal(*arguments, **sections):
    config, _, implied = planned(*arguments, **sections)
    with pytest.raises(ConfigError) as caught:
        gpu_checks.shares(config, implied)
    return str(caught.value)


def test_an_engine_that_leaves_the_trainer_too_little_is_refused_with_the_value_that_fits():
    message = refusal(1)
    assert message.startswith("rollout.vllm.gpu_memory_utilization=0.9: the engine takes 36.0 GB of the 40.0")
    assert "on which trainer-0 needs about 19." in message
    assert message.endswith("use rollout.vllm.gpu_memory_utilization=0.4 or less, or more GPUs")
    config, placement, implied = planned(1, rollout=share(0.4))
    gpu_checks.shares(config, implied)
    assert list(gpu_checks.warnings(config, placement, implied)) == [
        "several processes share a GPU: each is slower while another computes"
    ]


def test_several_engines_on_the_gpu_share_what_is_left():
    message = refusal(1, rollout={"workers": 2, **share(0.45)})
    assert "2 engines take 36.0 GB" in message
    assert "gpu_memory_utilization=0.2 or less" in message


def test_engines_alone_on_a_gpu_must_fit_as_well():
    message = refusal(1, rollout={"workers": 2, **share(0.6)}, trainer={"device": "cpu"})
    assert "2 engines take 48.0 GB of the 40.0 GB of GPU 0; use" in message
    assert "gpu_memory_utilization=0.45 or less" in message


def test_where_no_value_fits_another_way_is_named():
    assert "leaves too little for an engine; use more GPUs or" in refusal(1, 20 * 10**9, rollout=share(0.2))
    offloading = {"backend": "deepspeed", "deepspeed": {"offload_optimizer": True}}
    config, _, implied = planned(1, 20 * 10**9, rollout=share(0.5), trainer=offloading)
    gpu_checks.shares(config, implied)


def test_in_turns_a_gpu_is_to_hold_the_larger_of_the_two_and_what_stays_of_the_other():
    turns = {"placement": {"colocate": "turns"}}
    settings = {"kv_on_update": "recompute", **share(0.85)}
    config, placement, implied = planned(1, rollout=settings, **turns)
    gpu_checks.shares(config, implied)  # which leaves the trainer too little where both have memory at a time
    assert not list(gpu_checks.warnings(config, placement, implied))
    memory = {m.kind: m for m in implied.memory}
    trainer, engine = memory["trainer"], memory["rollout"]
    assert implied.gpus[0].total_bytes == engine.total_bytes + trainer.asleep_bytes
    assert 10**8 < trainer.asleep_bytes < 10**9
    moved = trainer.certain_bytes - trainer.parts["CUDA"]
    assert trainer.host_parts["asleep"] == moved > 10**10
    ranks = {"backend": "deepspeed", "ranks": 2, "deepspeed": {"zero_stage": 3}}
    of_two = planned(2, rollout=settings, trainer=ranks, **turns)[2].memory[0]
    assert of_two.host_parts["asleep"] == of_two.certain_bytes - of_two.parts["CUDA"]  # NCCL's stays
    assert engine.host_parts["weights, asleep"] == 2 * 10**9
    deep = {"kv_on_update": "recompute", "vllm": {"gpu_memory_utilization": 0.85, "sleep_level": 2}}
    assert "weights, asleep" not in planned(1, rollout=deep, **turns)[2].memory[1].host_parts
    small = {"kv_on_update": "recompute", **share(0.3)}
    implied = planned(1, rollout=small, **turns)[2]
    assert implied.gpus[0].total_bytes == trainer.total_bytes + engine.asleep_bytes
    refused = refusal(1, rollout={"kv_on_update": "recompute", **share(1.0)}, **turns)
    assert "the engine takes 40.0 GB of the 40.0 GB of GPU 0, on which trainer-0 needs about" in refused
    assert refused.endswith("gpu_memory_utilization=0.9 or less, or more GPUs")


def test_a_gpu_of_its_own_is_the_engine_s_to_take():
    config, placement, implied = planned(2)
    gpu_checks.shares(config, implied)
    assert not list(gpu_checks.warnings(config, placement, implied))


def test_without_the_model_s_sizes_nothing_is_judged():
    config, placement, implied = planned(1, model=None)
    gpu_checks.shares(config, implied)
    assert len(list(gpu_checks.warnings(config, placement, implied))) == 1


def test_what_does_not_fit_is_warned_of():
    (trainer,) = gpu_checks.warnings(*planned(2, 15 * 10**9))
    assert trainer.startswith("GPU 0: about 19.")
    assert "for trainer-0, and it has 15.0 GB; lower trainer.micro_batch_tokens, or share the" in trainer


def test_an_estimate_that_leaves_next_to_nothing_is_warned_of_and_an_engine_of_its_own_is_not():
    total = planned(2)[2].gpus[0].total_bytes
    tight = planned(2, int(total / 0.95), rollout=share(0.95))
    (warning,) = gpu_checks.warnings(*tight)
    assert "for trainer-0, which leaves less than 8% for what an estimate misses; lower" in warning
    assert not list(gpu_checks.warnings(*planned(2, int(total / 0.9), rollout=share(0.95))))


def test_a_share_that_holds_no_sequence_is_refused():
    message = refusal(2, 2 * 10**9)
    assert "holds the weights and not one sequence of full length; raise it" in message


def test_room_for_keys_and_values_is_what_weights_and_workspace_leave_of_all_its_gpus():
    implied = planned(2)[2]
    workspace = next(m.parts["workspace"] for m in implied.memory if m.kind == "rollout")
    assert workspace > GRAPHS_AND_LIBRARIES_BYTES
    assert implied.kv_sequences == (0.9 * CARD - 2 * 10**9 - workspace) // (356 * 10**5)
    two = planned(3, rollout={"tensor_parallel_size": 2})[2]
    assert two.kv_sequences == (2 * (0.9 * CARD - workspace) - 2 * 10**9) // (356 * 10**5)
    assert planned(2, rollout={"engine": "torch"})[2].kv_sequences is None
