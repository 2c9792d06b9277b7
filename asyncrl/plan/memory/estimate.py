"""What each process needs of the memory where it computes, estimated from the model's sizes. Pure.

The trainer's are in `trainer.py` (with `activations.py` and what the backend says), those of engines in their
specs. They hold what grows with model and settings. What a process takes for Python and torch (0.3 to 0.6 GB
of host memory, with CUDA's libraries 2 to 4) comes on top.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from asyncrl.config import Config, RewardModelConfig
from asyncrl.decoders.facts import DTYPE_BYTES, ModelFacts
from asyncrl.plan.facts.models import KnownModels
from asyncrl.plan.facts.reward import RewardModelFacts
from asyncrl.plan.memory.activations import forward_bytes
from asyncrl.plan.memory.adapters import trained_parameters
from asyncrl.plan.memory.trainer import ALLOCATOR, COMPUTED, CUDA_CONTEXT_BYTES, NCCL, trainer_parts
from asyncrl.plan.resources import Placement
from asyncrl.reward_models.initial import judge_config
from asyncrl.roles import ENGINES, JUDGE, REWARD, ROLLOUT, TRAINER, Role, names
from asyncrl.rollout.engines.spec import Card, engine_of
from asyncrl.trainer.backend import backend_of
from asyncrl.weights.transport import transport_bytes, transport_gpu_bytes

SHARED_WEIGHTS = "shared weights"
"""The `Memory.kind` of what the trainer publishes weight versions in."""


VERSION = "version for engines"
TAKE_TURNS = (TRAINER, ROLLOUT)
"""The kinds of role that do where `placement.colocate` says so."""


@dataclass(frozen=True, slots=True)
class Memory:
    """Estimated bytes of each process of a kind, or of what processes share."""

    kind: str
    """The processes' `Place.kind`, or `SHARED_WEIGHTS`."""
    parts: dict[str, int]
    """Where it computes: on each of its GPUs, or in host memory."""
    host_parts: dict[str, int] = field(default_factory=dict)
    """In host memory besides."""

    @property
    def total_bytes(self) -> int:
        return sum(self.parts.values())

    @property
    def asleep_bytes(self) -> int:
        """What stays on a GPU while it is somebody else's turn (`placement.colocate: turns`): CUDA's context,
        and what others may want to read."""
        return CUDA_CONTEXT_BYTES + sum(self.parts.get(part, 0) for part in (NCCL, VERSION))

    @property
    def certain_bytes(self) -> int:
        """Without what hangs on kernels, on how full the batches are, and on libraries: weights, optimizer,
        gradients and buffers are sure."""
        rough = (COMPUTED, ALLOCATOR, NCCL)
        return sum(n for part, n in self.parts.items() if not part.startswith(rough))


@dataclass(frozen=True, slots=True)
class GpuLoad:
    """Who computes on a GPU, and the estimated bytes of each."""

    gpu: int
    card_bytes: int
    roles: tuple[str, ...]
    bytes: tuple[int | None, ...]
    """Of each of `roles`; None where its model's sizes are not known."""
    asleep: tuple[int | None, ...] | None = None
    """Of each, what stays while it is somebody else's turn; None where nobody takes turns."""

    @property
    def total_bytes(self) -> int:
        """Of those that are known, at the same time."""
        if self.asleep is None:
            return sum(n or 0 for n in self.bytes)
        return max(self._while_others_sleep(kind) for kind in TAKE_TURNS)

    def _while_others_sleep(self, awake: str) -> int:
        assert self.asleep is not None
        sleeping = {*TAKE_TURNS} - {awake}
        every = zip(self.roles, self.bytes, self.asleep, strict=True)
        return sum((a if Role.parse(role).kind in sleeping else n) or 0 for role, n, a in every)


def weights_bytes(config: Config, model: ModelFacts) -> int:
    """One version of the weights, in the dtype that is computed in."""
    return model.parameters * DTYPE_BYTES[config.model.dtype]


def published_bytes(config: Config, model: ModelFacts) -> int:
    """What is published of a version."""
    return trained_parameters(config, model) * DTYPE_BYTES[config.model.dtype]


def shared_weights_bytes(config: Config, model: ModelFacts, *, on_gpu: bool) -> int:
    """What holds the newest versions on their way; next to nothing where nothing is computed. on_gpu: whether
    the trainer computes on one, where they may stay."""
    if not backend_of(config).computes:
        return 0
    published = published_bytes(config, model)
    stays = on_gpu and transport_gpu_bytes(config.transport, published)
    n_bytes = 0 if stays else transport_bytes(config.transport, published)
    if config.trainer.lora is not None and engine_of(config).starts_processes:
        n_bytes += config.rollout.workers * weights_bytes(config, model)  # merged, for the engine's processes
    return n_bytes


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
    longest_tokens = config.rollout.context_tokens(longest_prompt_tokens)
    entries = []
    trained = [models.policy]
    trained += [models.critic] if config.critic is not None else []
    trained += [getattr(models, name) for name in config.frozen]
    if models.policy is not None and None not in trained:
        here, in_host = trainer_parts(config, models, models.policy, longest_tokens, TRAINER in on_gpu)
        kept = transport_gpu_bytes(config.transport, published_bytes(config, models.policy))
        if config.placement.in_turns and TRAINER in on_gpu:
            in_host = in_host | {"asleep": Memory(TRAINER, here).certain_bytes - CUDA_CONTEXT_BYTES}
        if kept and TRAINER in on_gpu:
            here = here | {VERSION: kept}  # of rank 0
        entries.append(Memory(TRAINER, here, in_host))
    for kind in ENGINES:
        if not placement.of(kind):
            continue
        card, own, tokens = _card(placement, kind, gpu_bytes), config, longest_tokens
        if kind == JUDGE and any(judge.is_initial for judge in config.reward.judges):
            own, question = judge_config(config, longest_prompt_tokens)
            tokens = own.rollout.context_tokens(question)
        if (parts := engine_of(config).memory(own, models.policy, tokens, card)) is not None:
            here, in_host = parts
            if config.trainer.lora is not None and models.policy is not None and kind != JUDGE:
                in_host = in_host | {"base of the adapter": weights_bytes(config, models.policy)}
            entries.append(Memory(kind, here, in_host))
    roles = names(REWARD, len(models.reward))
    for role, model, facts in zip(roles, config.reward.models, models.reward, strict=False):
        if facts is not None:
            parts = _reward_model_parts(model, facts, longest_tokens, role in on_gpu)
            entries.append(Memory(role, *parts))
    if models.policy is not None:
        versions = shared_weights_bytes(config, models.policy, on_gpu=TRAINER in on_gpu)
        entries.append(Memory(SHARED_WEIGHTS, {"versions": versions}))
    return tuple(entries)


def _card(placement: Placement, kind: str, gpu_bytes: Sequence[int]) -> Card | None:
    """The GPU that an engine of processes of this kind computes on; None on the CPU."""
    gpus = {gpu for place in placement.of(kind) for gpu in place.gpus}
    is_shared = any(len(placement.on(gpu)) > 1 for gpu in gpus)
    return Card(min(gpu_bytes), CUDA_CONTEXT_BYTES, is_shared) if gpus else None


def _reward_model_parts(
    settings: RewardModelConfig, facts: RewardModelFacts, longest_tokens: int, on_gpu: bool
) -> tuple[dict[str, int], dict[str, int]]:
    """Of a reward model, which scores under a mask, padding included: where it computes, and in host memory
    besides."""
    value_bytes = DTYPE_BYTES[settings.dtype]
    weights = facts.parameters * value_bytes
    tokens = max(settings.batch_tokens, longest_tokens)
    parts = {
        "weights": weights,
        "activations": forward_bytes(facts.layer, tokens, value_bytes, longest_tokens),
    }
    # The weights go through host memory as they are loaded.
    return (parts | {"CUDA": CUDA_CONTEXT_BYTES}, {"loading": weights}) if on_gpu else (parts, {})


def gpu_loads(
    placement: Placement, memory: Sequence[Memory], gpu_bytes: Sequence[int], *, in_turns: bool = False
) -> tuple[GpuLoad, ...]:
    """What lies on each GPU in use."""
    total_bytes = {m.kind: m.total_bytes for m in memory}
    asleep_bytes = {m.kind: m.asleep_bytes for m in memory}
    loads = []
    for gpu in placement.used_gpus:
        places = placement.on(gpu)
        n_bytes = tuple(total_bytes.get(place.kind) for place in places)
        asleep = tuple(asleep_bytes.get(place.kind) for place in places) if in_turns else None
        loads.append(GpuLoad(gpu, gpu_bytes[gpu], tuple(place.role for place in places), n_bytes, asleep))
    return tuple(loads)


def host_bytes(placement: Placement, memory: Iterable[Memory]) -> int | None:
    """Everything that does not lie on a GPU; None where something is not known."""
    entries = {m.kind: m for m in memory}
    if any(place.kind not in entries for place in placement.places):
        return None
    total = entries[SHARED_WEIGHTS].total_bytes
    for place in placement.places:
        entry = entries[place.kind]
        total += sum(entry.host_parts.values()) + (0 if place.gpus else entry.total_bytes)
    return total
