"""What a rank of the trainer needs of its GPU, or of host memory where it computes there. Pure."""

from __future__ import annotations

from collections.abc import Iterator

from asyncrl.config import Config
from asyncrl.decoders.facts import DTYPE_BYTES, ModelFacts
from asyncrl.plan.facts.models import KnownModels
from asyncrl.plan.memory import adapters
from asyncrl.plan.memory.activations import (
    divergence_bytes,
    final_norm_backward_bytes,
    final_norm_bytes,
    forward_bytes,
    head_bytes,
    kept_bytes,
    layer_backward_bytes,
)
from asyncrl.trainer.backend import backend_of
from asyncrl.trainer.backends.memory import TrainedMemory

CUDA_CONTEXT_BYTES = 7 * 10**8
"""What CUDA and its libraries take of a GPU for each process: the context with its kernels (about 0.5 GB on
an H100), cuBLAS's workspaces. An estimate."""
NCCL_BYTES = 10**9
"""What NCCL takes of a GPU for the groups of one process: up to 32 channels, with buffers of about 10 MB for
each connection (NCCL_BUFFSIZE and those of the LL protocols), of a ring and a tree. An estimate."""
FRAGMENTATION_SHARE = 0.1
"""Of what comes and goes, so much is held by torch's allocator and of no use, with segments that can grow
(`expandable_segments`). An estimate: without them, 15% of everything were measured, and up to 33% (Guo et al.
2024, arXiv 2401.08156)."""

COMPUTED, ALLOCATOR, NCCL = "computing", "fragmentation", "NCCL"


def trainer_parts(
    config: Config, models: KnownModels, policy: ModelFacts, longest_tokens: int, on_gpu: bool
) -> tuple[dict[str, int], dict[str, int]]:
    """Of one rank: where it computes, and in host memory besides. longest_tokens: of prompt and response."""
    backend, value_bytes = backend_of(config), DTYPE_BYTES[config.model.dtype]
    if not backend.computes:
        return {}, {}
    trained = backend.memory(config, value_bytes, on_gpu=on_gpu)
    parts, host_parts = adapters.kept(config, trained, policy, on_gpu=on_gpu)
    if models.critic is not None:
        critic, critic_in_host = adapters.kept(config, trained, models.critic, on_gpu=on_gpu)
        parts["critic"] = sum(critic.values())
        host_parts["critic"] = sum(critic_in_host.values())
    if config.objective.proximal == "ewma":
        parts["averaged policy"] = (value_bytes + 4 * (value_bytes < 4)) * policy.parameters
    own = {n: facts for n, facts in models.frozen.items() if n != "reference" or has_own_reference(config)}
    in_turns = config.placement.in_turns
    parked = {n for n, section in config.frozen.items() if section.offload or in_turns}
    offloaded = {n for n in own if on_gpu and n in parked}
    for name, facts in own.items():
        (host_parts if name in offloaded else parts)[name] = value_bytes * facts.parameters
    tokens = max(config.trainer.micro_batch_tokens, longest_tokens)
    row_tokens = masked_row_tokens(config, tokens, longest_tokens, on_gpu)
    phases = dict(_phases(config, trained, models, policy, tokens, row_tokens))
    if models.teacher is not None and config.teacher is not None and config.teacher.form == "exact":
        phases["divergence"] = phases["last norm"] + divergence_bytes(
            *(policy.layer, models.teacher.layer, policy.vocab_size, tokens),
            *(config.trainer.logit_chunk_tokens, value_bytes),
        )
    for name in offloaded:
        phases[name] += value_bytes * own[name].parameters
    # One thing is computed at a time: the largest counts, and the others use its memory.
    largest = max(phases, key=lambda name: phases[name])
    parts[f"{COMPUTED}: {largest}"] = phases[largest]
    if on_gpu:
        parts[ALLOCATOR] = int(FRAGMENTATION_SHARE * (phases[largest] + parts.get("gathered weights", 0)))
        groups = (config.trainer.ranks > 1) + (config.transport == "collective")
        parts[NCCL] = NCCL_BYTES * groups
        parts["CUDA"] = CUDA_CONTEXT_BYTES
    host_parts |= _in_host(config, models, policy, on_gpu)
    return parts, host_parts


def has_own_reference(config: Config) -> bool:
    """Whether the reference is a model of its own, where there is one: else the policy, with its adapter
    off."""
    return config.reference is not None and (config.trainer.lora is None or config.reference.path is not None)


def masked_row_tokens(config: Config, tokens: int, longest_tokens: int, on_gpu: bool) -> int:
    """Length of the rows that attention computes under a dense mask; 0 where its kernel needs none."""
    if takes_sequences(config, on_gpu):
        return 0
    return min(tokens, longest_tokens)


def takes_sequences(config: Config, on_gpu: bool) -> bool:
    """Whether the attention kernel computes the sequences of a row one by one."""
    chosen = config.model.attn_implementation
    if chosen == "auto":
        return on_gpu and config.model.dtype == "bfloat16"
    return chosen in ("varlen", "flash_attention_2")


def _phases(
    config: Config,
    trained: TrainedMemory,
    models: KnownModels,
    policy: ModelFacts,
    tokens: int,
    row_tokens: int,
) -> Iterator[tuple[str, int]]:
    """What is computed in turn, and what each takes at its peak beside what stays."""
    yield from _training_phases(config, trained, policy, tokens, row_tokens, has_head=True)
    if models.critic is not None:
        critic = _training_phases(config, trained, models.critic, tokens, row_tokens, has_head=False)
        for name, n_bytes in critic:
            yield f"{name} of the critic", n_bytes
    for name, facts in models.frozen.items():
        yield name, forward_bytes(facts.layer, tokens, trained.value_bytes, row_tokens)


def _training_phases(
    config: Config, trained: TrainedMemory, model: ModelFacts, tokens: int, row_tokens: int, *, has_head: bool
) -> Iterator[tuple[str, int]]:
    value_bytes, layer = trained.value_bytes, model.layer
    of_layer = kept_bytes(layer, tokens, value_bytes, row_tokens)
    inputs = model.layers * value_bytes * tokens * layer.hidden_size
    rotary = 2 * value_bytes * tokens * layer.head_dim
    kept = rotary + (inputs if config.trainer.gradient_checkpointing else model.layers * of_layer)
    norm = final_norm_bytes(layer, tokens, value_bytes)
    embeddings = model.vocab_size * layer.hidden_size
    is_whole = config.trainer.lora is None
    tied_gradient = value_bytes * embeddings if has_head and model.tied_head and is_whole else 0
    if has_head:
        head = head_bytes(
            layer,
            model.vocab_size,
            tokens,
            config.trainer.logit_chunk_tokens,
            value_bytes,
            entropy_has_gradient=config.objective.entropy_coef > 0,
            caps_logits=model.form.caps_logits,
            weight_has_gradient=is_whole,
        )
        yield "logits", kept + norm + head
    yield "last norm", kept + norm + final_norm_backward_bytes(layer, tokens) + tied_gradient
    # A tied head's gradient waits for that of the embeddings, which comes last.
    parameters = adapters.trained_parameters(config, model)
    waiting = tied_gradient + trained.arriving(parameters)
    recomputed = of_layer if config.trainer.gradient_checkpointing else 0
    backward = recomputed + layer_backward_bytes(layer, tokens, value_bytes)
    sending = trained.sending(min(trained.bucket, parameters))
    yield "layers", kept + backward + waiting + sending
    if is_whole:
        yield "embeddings", value_bytes * embeddings + waiting + trained.sending(embeddings)
    yield "update", trained.updating(parameters, min(embeddings, parameters))


def _in_host(config: Config, models: KnownModels, policy: ModelFacts, on_gpu: bool) -> dict[str, int]:
    """What a rank takes of host memory wherever it computes: a share of the checkpoint that is being written,
    and, before it computes, the model that it loads."""
    value_bytes = DTYPE_BYTES[config.model.dtype]
    loaded = [facts.parameters for facts in models.trained.values()]
    # One model after the other goes through host memory, and all of it is free before the first checkpoint.
    loading = value_bytes * max(loaded) if on_gpu else 0
    share = -(-snapshot_bytes(config, models, policy) // config.trainer.ranks)
    return {"checkpoint": share} if share >= loading else {"loading": loading}


def snapshot_bytes(config: Config, models: KnownModels, policy: ModelFacts) -> int:
    """What training needs to go on, in host memory or on disk: of policy and critic float32 weights and
    AdamW's two moments, the policy in the model's dtype, and a float32 average of it where there is one."""
    value_bytes = DTYPE_BYTES[config.model.dtype]
    learners = [facts for facts in (policy, models.critic) if facts is not None]
    of_learners = [adapters.trained_parameters(config, facts) for facts in learners]
    averaged = 4 * policy.parameters if config.objective.proximal == "ewma" else 0
    return 12 * sum(of_learners) + value_bytes * of_learners[0] + averaged
