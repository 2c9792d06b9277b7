"""What each process needs of the memory where it computes, estimated from the model's sizes. Pure.

The estimates hold what grows with model and settings. What a process takes for Python and torch (0.3 to
0.6 GB of host memory) comes on top.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from asyncrl.config import Config, RewardModelConfig
from asyncrl.runtime.model_facts import DTYPE_BYTES, ModelFacts
from asyncrl.runtime.models import KnownModels
from asyncrl.runtime.resources import Placement
from asyncrl.runtime.reward_facts import RewardModelFacts

SHARED_WEIGHTS = "shared weights"
"""The `Memory.kind` of what the trainer publishes weight versions in."""
ACTIVATIONS, LOGITS = "activations", "logits"
_ROUGH = (ACTIVATIONS, LOGITS)
"""Parts that hang on the attention kernel and on how full the batches are; the others are counted."""
_ADAM_BYTES = 8
"""Two float32 moments a parameter."""
_VALUES_PER_TOKEN_AND_LAYER = 17
"""Activations kept for the backward pass, in units of the hidden size, without attention scores: the 34
bytes a token and layer at 16 bits of Korthikanti et al. 2022 (arXiv 2205.05198), equation 2."""
_ZERO3_LIVE_PARAMETERS = 10**9
"""Parameters that ZeRO 3 keeps gathered at the same time, at most: DeepSpeed's
`stage3_max_live_parameters`."""
CUDA_CONTEXT_BYTES = 5 * 10**8
"""What CUDA and its libraries take of a GPU for each process."""


@dataclass(frozen=True, slots=True)
class Memory:
    """Estimated bytes of each process of a kind, or of what processes share."""

    kind: str
    """The processes' `Place.kind`, or `SHARED_WEIGHTS`."""
    parts: dict[str, int]
    """Where it computes: on each of its GPUs, or in host memory."""
    host_parts: dict[str, int] = field(default_factory=dict)
    """In host memory besides, of a process that computes on GPUs."""

    @property
    def total_bytes(self) -> int:
        return sum(self.parts.values())

    @property
    def certain_bytes(self) -> int:
        """Without what is only roughly known."""
        return sum(n for part, n in self.parts.items() if part not in _ROUGH)


@dataclass(frozen=True, slots=True)
class GpuLoad:
    """Who computes on a GPU, and the estimated bytes of each."""

    gpu: int
    card_bytes: int
    roles: tuple[str, ...]
    bytes: tuple[int | None, ...]
    """Of each of `roles`; None where its model's sizes are not known."""

    @property
    def total_bytes(self) -> int:
        """Of those that are known."""
        return sum(n or 0 for n in self.bytes)


def weights_bytes(config: Config, model: ModelFacts) -> int:
    """One version of the weights, in the dtype that is computed in and published."""
    return model.parameters * DTYPE_BYTES[config.model.dtype]


def shared_weights_bytes(config: Config, model: ModelFacts) -> int:
    """The shared memory that holds the two newest versions; next to nothing where training is paced."""
    return 0 if config.trainer.backend == "paced" else 2 * weights_bytes(config, model)


def estimate_memory(
    config: Config,
    placement: Placement,
    models: KnownModels,
    longest_prompt_tokens: int,
    gpu_bytes: Sequence[int],
) -> tuple[Memory, ...]:
    """An entry for each kind of process whose models are known, and one for the shared weights. `gpu_bytes`:
    of each GPU."""
    on_gpu = {place.kind for place in placement.places if place.gpus}
    card_bytes = min(gpu_bytes) if "rollout" in on_gpu else None
    entries = []
    trained = [models.policy]
    trained += [models.critic] if config.critic is not None else []
    trained += [models.reference] if config.reference is not None else []
    if models.policy is not None and None not in trained:
        entries.append(_trainer(config, models, models.policy, "trainer" in on_gpu))
    if models.policy is not None or (config.rollout.engine == "vllm" and card_bytes is not None):
        entries.append(_rollout(config, models.policy, longest_prompt_tokens, card_bytes))
    for i, facts in enumerate(models.reward):
        if facts is not None:
            kind = f"reward-{i}"
            entries.append(_reward_model(kind, config.reward.models[i], facts, kind in on_gpu))
    if models.policy is not None:
        two_versions = shared_weights_bytes(config, models.policy)
        entries.append(Memory(SHARED_WEIGHTS, {"two versions": two_versions}))
    return tuple(entries)


def _trainer(config: Config, models: KnownModels, policy: ModelFacts, on_gpu: bool) -> Memory:
    """One rank. With DeepSpeed the ranks share out optimizer, gradients and weights by stages 1, 2 and 3 of
    ZeRO (Rajbhandari et al. 2020, arXiv 1910.02054, figure 1), and host memory takes what is offloaded."""
    trainer = config.trainer
    if trainer.backend == "paced":
        return Memory("trainer", {})
    value_bytes = DTYPE_BYTES[config.model.dtype]
    parts, host_parts = _trained(config, policy.parameters, on_gpu)
    if models.critic is not None:
        critic, critic_in_host = _trained(config, models.critic.parameters, on_gpu)
        parts["critic"] = sum(critic.values())
        host_parts["critic"] = sum(critic_in_host.values())
    if models.reference is not None and config.reference is not None:
        reference = value_bytes * models.reference.parameters
        parts["reference"] = 0 if on_gpu and config.reference.offload else reference
        host_parts["reference"] = reference if on_gpu and config.reference.offload else 0
    # One model computes at a time: the largest counts.
    sizes = [facts for facts in (policy, models.critic, models.reference) if facts is not None]
    parts[ACTIVATIONS] = max(_activations(config, facts) for facts in sizes)
    parts[LOGITS] = 2 * 4 * trainer.logit_chunk_tokens * policy.vocab_size
    if on_gpu:
        parts["CUDA"] = CUDA_CONTEXT_BYTES
    return Memory("trainer", parts, host_parts)


def _trained(config: Config, parameters: int, on_gpu: bool) -> tuple[dict[str, int], dict[str, int]]:
    """What training a model of so many parameters keeps on a rank: where it computes, and in host memory
    besides."""
    trainer, zero = config.trainer, config.trainer.deepspeed
    value_bytes = DTYPE_BYTES[config.model.dtype]
    # Stage 0 shares out nothing, and plain torch does it.
    stage = zero.zero_stage if trainer.backend == "deepspeed" else 0

    def of_rank(n_bytes: int, from_stage: int) -> int:
        return -(-n_bytes // trainer.ranks) if stage >= from_stage else n_bytes

    parts = {
        "weights": of_rank(value_bytes * parameters, 3),
        "float32 weights": 0 if value_bytes == 4 else of_rank(4 * parameters, 1),
        # Plain torch sums them up in float32.
        "gradients": of_rank((value_bytes if stage else 4) * parameters, 2),
        "optimizer": of_rank(_ADAM_BYTES * parameters, 1),
    }
    host_parts = {}
    if stage == 3:
        parts["gathered weights"] = value_bytes * min(parameters, _ZERO3_LIVE_PARAMETERS)
    if stage and on_gpu and zero.offload_optimizer:
        host_parts = {name: parts.pop(name) for name in ("float32 weights", "optimizer")}
        host_parts["float32 gradients"] = of_rank(4 * parameters, 1)
    if stage == 3 and on_gpu and zero.offload_parameters:
        host_parts["weights"] = parts.pop("weights")
    return parts, host_parts


def _activations(config: Config, model: ModelFacts) -> int:
    trainer = config.trainer
    layer = trainer.micro_batch_tokens * model.hidden_size * DTYPE_BYTES[config.model.dtype]
    kept = _VALUES_PER_TOKEN_AND_LAYER * layer
    return model.layers * layer + kept if trainer.gradient_checkpointing else model.layers * kept


def _rollout(
    config: Config, model: ModelFacts | None, longest_prompt_tokens: int, card_bytes: int | None
) -> Memory:
    """One engine. `card_bytes`: the memory of its GPUs, None where it computes on the CPU."""
    rollout = config.rollout
    weights = weights_bytes(config, model) if model is not None else 0
    if rollout.engine == "paced":
        return Memory("rollout", {})
    if rollout.engine == "http":  # the servers' memory is their operators' business
        return Memory("rollout", {"incoming weights": weights})
    if rollout.engine == "vllm" and card_bytes is not None:
        # vLLM takes its share of the GPU whole, and fills what the weights leave of it with its KV cache.
        share = int(rollout.vllm.gpu_memory_utilization * card_bytes)
        own = -(-weights // rollout.tensor_parallel_size)
        parts = {"weights": own, "KV cache and graphs": max(0, share - own)}
        # Each of its ranks stages a whole version.
        return Memory("rollout", parts, {"incoming weights": rollout.tensor_parallel_size * weights})
    assert model is not None
    sequence_tokens = longest_prompt_tokens + rollout.max_new_tokens
    parts = {
        "weights": weights,
        "incoming weights": weights,
        "KV cache": rollout.slots * sequence_tokens * model.kv_bytes_per_token,
        LOGITS: 2 * 4 * rollout.slots * model.vocab_size,
    }
    if card_bytes is None:
        return Memory("rollout", parts)
    return Memory("rollout", parts | {"CUDA": CUDA_CONTEXT_BYTES}, {"incoming weights": weights})


def _reward_model(kind: str, settings: RewardModelConfig, facts: RewardModelFacts, on_gpu: bool) -> Memory:
    value_bytes = DTYPE_BYTES[settings.dtype]
    layer = settings.batch_tokens * facts.hidden_size * value_bytes
    parts = {
        "weights": facts.parameters * value_bytes,
        ACTIVATIONS: _VALUES_PER_TOKEN_AND_LAYER * layer,
    }
    return Memory(kind, parts | {"CUDA": CUDA_CONTEXT_BYTES} if on_gpu else parts)


def gpu_loads(
    placement: Placement, memory: Iterable[Memory], gpu_bytes: Sequence[int]
) -> tuple[GpuLoad, ...]:
    """What lies on each GPU in use."""
    total_bytes = {m.kind: m.total_bytes for m in memory}
    loads = []
    for gpu in placement.used_gpus:
        places = placement.on(gpu)
        n_bytes = tuple(total_bytes.get(place.kind) for place in places)
        loads.append(GpuLoad(gpu, gpu_bytes[gpu], tuple(place.role for place in places), n_bytes))
    return tuple(loads)


def host_bytes(placement: Placement, memory: Iterable[Memory]) -> int | None:
    """Everything that does not lie on a GPU; None where something is not known."""
    entries = {m.kind: m for m in memory}
    if any(place.kind not in entries for place in placement.places):
        return None
    total = entries[SHARED_WEIGHTS].total_bytes
    for place in placement.places:
        entry = entries[place.kind]
        total += sum(entry.host_parts.values()) if place.gpus else entry.total_bytes
    return total
