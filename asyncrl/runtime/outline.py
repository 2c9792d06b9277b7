"""What a config implies, computed before anything runs: processes, sizes, bounds, memory. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from asyncrl.config import Config, RewardModelConfig
from asyncrl.runtime.model_facts import DTYPE_BYTES, ModelFacts
from asyncrl.runtime.resources import Place, Placement
from asyncrl.runtime.reward_facts import RewardModelFacts

SHARED_WEIGHTS = "shared weights"
"""The `Memory.role` of what the trainer publishes weight versions in."""
_ADAM_BYTES = 8
"""Two float32 moments a parameter."""
_VALUES_PER_TOKEN_AND_LAYER = 17
"""Activations kept for the backward pass, in units of the hidden size, without attention scores: the 34
bytes a token and layer at 16 bits of Korthikanti et al. 2022 (arXiv 2205.05198), equation 2."""


@dataclass(frozen=True, slots=True)
class Processes:
    """Equal processes of the run."""

    role: str
    count: int
    threads: int
    """CPU threads that each computes with; 0 for those without a setting."""
    gpus: tuple[int, ...] = ()
    """The GPUs that they compute on."""


@dataclass(frozen=True, slots=True)
class Memory:
    """Estimated bytes of one process, or of what processes share."""

    role: str
    parts: dict[str, int]

    @property
    def total_bytes(self) -> int:
        return sum(self.parts.values())


@dataclass(frozen=True, slots=True)
class Outline:
    processes: tuple[Processes, ...]
    memory: tuple[Memory, ...]
    rows: int
    longest_prompt_tokens: int
    responses_per_step: int
    max_response_tokens_per_step: int
    """Upper bound of sampled tokens that one step trains on."""
    max_tokens_per_step: int
    """The same with each response's prompt counted."""
    updates_per_step: int
    groups_per_update: float
    total_updates: int
    max_staleness_updates: int
    """The staleness bound in optimizer updates: versions times updates per step."""
    max_groups_outstanding: int
    """Groups admitted and not yet trained on, at most: (bound + 1) * batch_groups."""
    max_responses_outstanding: int
    slots: int
    """Responses that all engines can decode at the same time."""
    epochs: float
    """Passes over the dataset in `run.steps` steps, when nothing is dropped."""

    host_memory_bytes: int
    """Estimate of everything that does not lie on a GPU."""

    @property
    def threads(self) -> int:
        return sum(p.count * p.threads for p in self.processes)


def outline(
    config: Config,
    placement: Placement,
    model: ModelFacts,
    rows: int,
    longest_prompt_tokens: int,
    reward_models: Sequence[RewardModelFacts] = (),
) -> Outline:
    """What `config` implies for `rows` usable prompts of up to `longest_prompt_tokens` tokens."""
    trainer, rollout, eta = config.trainer, config.rollout, config.staleness.bound
    responses = trainer.batch_groups * rollout.group_size
    response_tokens = responses * rollout.max_new_tokens
    outstanding = (eta + 1) * trainer.batch_groups
    memory = estimate_memory(config, model, longest_prompt_tokens, reward_models)
    return Outline(
        processes=tuple(_processes(config, placement)),
        memory=memory,
        rows=rows,
        longest_prompt_tokens=longest_prompt_tokens,
        responses_per_step=responses,
        max_response_tokens_per_step=response_tokens,
        max_tokens_per_step=response_tokens + responses * longest_prompt_tokens,
        updates_per_step=trainer.mini_batches,
        groups_per_update=trainer.batch_groups / trainer.mini_batches,
        total_updates=config.run.steps * trainer.mini_batches,
        max_staleness_updates=eta * trainer.mini_batches,
        max_groups_outstanding=outstanding,
        max_responses_outstanding=outstanding * rollout.group_size,
        slots=rollout.workers * rollout.slots,
        epochs=config.run.steps * trainer.batch_groups / rows,
        host_memory_bytes=_host_bytes(memory, placement),
    )


def _processes(config: Config, placement: Placement) -> Iterator[Processes]:
    workers, trainer = placement.rollout, placement.trainer
    if config.run.mode == "inline":
        yield Processes("inline", 1, trainer.threads, _gpus(placement.places))
    else:
        yield Processes("launcher", 1, 0)
        yield Processes("coordinator", 1, 0)
        yield Processes("rollout", len(workers), workers[0].threads, _gpus(workers))
        yield Processes("trainer", 1, trainer.threads, _gpus([trainer]))
        for place in placement.reward:
            yield Processes(place.role, 1, place.threads, _gpus([place]))
    if config.reward.functions or config.reward.format.pattern is not None:
        yield Processes("reward functions", len(workers) * config.reward.workers, 0)


def _gpus(places: Iterable[Place]) -> tuple[int, ...]:
    return tuple(sorted({place.gpu for place in places if place.gpu is not None}))


def weights_bytes(config: Config, model: ModelFacts) -> int:
    """One version of the weights, in the dtype that is computed in and published."""
    return model.parameters * DTYPE_BYTES[config.model.dtype]


def shared_weights_bytes(config: Config, model: ModelFacts) -> int:
    """The shared memory that holds the two newest versions; next to nothing where training is paced."""
    return 0 if config.trainer.backend == "paced" else 2 * weights_bytes(config, model)


def estimate_memory(
    config: Config,
    model: ModelFacts,
    longest_prompt_tokens: int,
    reward_models: Sequence[RewardModelFacts] = (),
) -> tuple[Memory, ...]:
    """Rough estimates by role, of what grows with model and settings; what a process takes for Python and
    torch (0.3 to 0.6 GB) comes on top."""
    sequence_tokens = longest_prompt_tokens + config.rollout.max_new_tokens
    return (
        Memory("trainer", _trainer_parts(config, model)),
        Memory("rollout", _rollout_parts(config, model, sequence_tokens)),
        *(
            Memory(f"reward-{i}", _reward_model_parts(settings, facts))
            for i, (settings, facts) in enumerate(zip(config.reward.models, reward_models, strict=True))
        ),
        Memory(SHARED_WEIGHTS, {"two versions": shared_weights_bytes(config, model)}),
    )


def _trainer_parts(config: Config, model: ModelFacts) -> dict[str, int]:
    if config.trainer.backend == "paced":
        return {}
    value_bytes = DTYPE_BYTES[config.model.dtype]
    layer = config.trainer.micro_batch_tokens * model.hidden_size * value_bytes
    kept = _VALUES_PER_TOKEN_AND_LAYER * layer
    checkpointed = model.layers * layer + kept
    return {
        "weights": weights_bytes(config, model),
        "float32 weights": 0 if config.model.dtype == "float32" else 4 * model.parameters,
        "gradients": weights_bytes(config, model),
        "optimizer": _ADAM_BYTES * model.parameters,
        "activations": checkpointed if config.trainer.gradient_checkpointing else model.layers * kept,
        "logits": 2 * 4 * config.trainer.logit_chunk_tokens * model.vocab_size,
    }


def _rollout_parts(config: Config, model: ModelFacts, sequence_tokens: int) -> dict[str, int]:
    if config.rollout.engine == "paced":
        return {}
    return {
        "weights": weights_bytes(config, model),
        "incoming weights": weights_bytes(config, model),
        "KV cache": config.rollout.slots * sequence_tokens * model.kv_bytes_per_token,
        "logits": 2 * 4 * config.rollout.slots * model.vocab_size,
    }


def _reward_model_parts(settings: RewardModelConfig, facts: RewardModelFacts) -> dict[str, int]:
    value_bytes = DTYPE_BYTES[settings.dtype]
    layer = settings.batch_tokens * facts.hidden_size * value_bytes
    return {
        "weights": facts.parameters * value_bytes,
        "activations": _VALUES_PER_TOKEN_AND_LAYER * layer,
    }


def _host_bytes(memory: Iterable[Memory], placement: Placement) -> int:
    roles = [place.role for place in placement.places if place.gpu is None]
    on_cpu = Counter(role if role.startswith("reward") else role.partition("-")[0] for role in roles)
    on_cpu[SHARED_WEIGHTS] = 1
    return sum(m.total_bytes * on_cpu[m.role] for m in memory)
