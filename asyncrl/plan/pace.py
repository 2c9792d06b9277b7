"""How long a run's parts take on GPUs, predicted from models' sizes, settings and placement. Pure.

Every number here is estimated, for cards of the H100's class (80 GB, SXM), and says where it comes from;
nothing was measured on one yet. What it is good for: which side sets the pace, what a budget of GPU hours is
worth, and whether a deadline leaves room. A prediction may be off by half.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Self

from asyncrl.config import STEP_STALLS, Config
from asyncrl.decoders.facts import DTYPE_BYTES, ModelFacts
from asyncrl.objective.catalogue import ADVANTAGES, POLICY_LOSSES, STEP_ADVANTAGES
from asyncrl.plan.facts.models import KnownModels
from asyncrl.plan.memory.adapters import trained_parameters
from asyncrl.plan.resources import Placement
from asyncrl.roles import REWARD, ROLLOUT, TRAINER, names
from asyncrl.rollout.engines.spec import EnginePace, engine_of
from asyncrl.runfiles.checkpoint_pace import interval_s

TRAINING_FLOPS_PER_S = 3.5e14
"""Of a GPU that trains or scores, estimated: 35% of an H100's dense bfloat16 peak (989 TFLOP/s), at which
GRLO's 76 GFLOP a token, attention apart, take 220 µs. With masked attention it is 340, with fused kernels
180."""
MEMORY_BYTES_PER_S = 2.5e12
"""Of a GPU that decodes, estimated: three quarters of an H100's 3.35 TB/s."""
CARD_BYTES = 80e9
PUBLISH_BYTES_PER_S = 3e9
"""The trainer's copy of a weight version into shared memory and its checksum, estimated."""
LOAD_BYTES_PER_S = 1e9
"""An engine's staging of a version, beside its decoding, and its swap, estimated: 8 GB take 9 s."""
SNAPSHOT_BYTES_PER_S = 1.5e9
"""Copying the trainer's state to host memory, which training waits for, estimated: 96 GB take 40 to 90 s."""
STATE_BYTES = 12
"""Of a parameter in a snapshot: a float32 weight and AdamW's two averages."""
DISK_BYTES_PER_S = 1e9
"""Reading a model's weights at the start, estimated for a local SSD."""
TRAINER_START_S = 45.0
"""From a process's start to its readiness without reading weights, estimated: imports, process groups."""
_ROOM = 2
"""A deadline should leave so many times what is expected."""
USUAL_PROMPT_SHARE = 1 / 4
"""Mean length of the prompts where nothing is known of them, in `data.max_prompt_tokens`, estimated."""


@dataclass(frozen=True, slots=True)
class Pace:
    """Estimated seconds of a run's parts, for one mean length of the responses.

    A training step goes on in all parts side by side, unless no staleness is allowed. What shares GPUs takes
    turns on them.
    """

    response_tokens: float
    prompt_tokens: float
    """Mean lengths."""
    train_s: float
    """Forward and backward passes and updates of a step, on all ranks at once."""
    micro_batch_s: float
    """Of that, one forward and backward pass of the slower of policy and critic on one rank."""
    generate_s: float
    """All responses of a step, on all engines at once, their slots full."""
    decode_step_s: float
    """A token for each of the `decoding` requests of an engine."""
    decoding: int
    """Requests that an engine decodes at the same time: slots, outstanding ones, or room for their keys and
    values."""
    score_s: Mapping[str, float]
    """Each reward model's time for the responses of a step, by its role."""
    publish_s: float
    """For the trainer to share a weight version."""
    load_s: float
    """From then on until an engine samples with it; it decodes meanwhile."""
    snapshot_s: float
    """For which training waits at a checkpoint."""
    start_s: float
    """From the first process's start until an engine samples."""
    steps_per_checkpoint: int
    """0: the only one is the last."""
    takes_turns: bool
    """Whether training and sampling wait for each other: no staleness is allowed."""
    gpus: Mapping[str, frozenset[int]]
    """The GPUs of the trainer, the engines and each reward model."""
    held_gpus: int
    """GPUs that the run holds."""

    @property
    def busy_s(self) -> Mapping[str, float]:
        """For how long each kind of process computes in a step."""
        checkpoint_s = self.snapshot_s / self.steps_per_checkpoint if self.steps_per_checkpoint else 0.0
        trainer_s = self.train_s + self.publish_s + checkpoint_s
        return {TRAINER: trainer_s, ROLLOUT: self.generate_s, **self.score_s}

    @property
    def step_s(self) -> float:
        """A training step in the long run, all waits included."""
        if self.takes_turns:
            sampling = [side - {TRAINER} for side in self._sides() if side != {TRAINER}]
            return max(map(self._turn_s, sampling)) + self.busy_s[TRAINER] + self.load_s
        return max(map(self._turn_s, self._sides()))

    @property
    def first_step_s(self) -> float:
        """The first training step: its whole batch is sampled and scored before it, and part of that in slots
        that were filled last."""
        return sum(self.busy_s.values()) + self.response_s

    @property
    def response_s(self) -> float:
        """From a response's start to its end."""
        return self.response_tokens * self.decode_step_s

    @property
    def bottleneck(self) -> frozenset[str]:
        """The kinds of process that set the pace: `trainer`, `rollout`, `reward-N`; several where they share
        GPUs."""
        return max(self._sides(), key=self._turn_s)

    @property
    def idle(self) -> Mapping[str, float]:
        """Share of a step in which the GPUs of each kind do nothing."""
        return {
            kind: 1 - self._work(side) / (len(self._gpus(side)) * self.step_s)
            for side in self._sides()
            for kind in sorted(side)
        }

    @property
    def idle_gpus(self) -> float:
        """Share of a step in which a GPU that the run holds does nothing, on average."""
        return 1 - sum(map(self._work, self._sides())) / (self.held_gpus * self.step_s)

    def hours(self, steps: int) -> float:
        """Wall clock of a whole run."""
        return (self.start_s + self.first_step_s + (steps - 1) * self.step_s) / 3600

    def gpu_hours(self, steps: int) -> float:
        """Of a whole run: all GPUs that it holds, whatever they do."""
        return self.held_gpus * self.hours(steps)

    def _sides(self) -> list[frozenset[str]]:
        """Kinds of process that have GPUs in common, together."""
        sides: list[frozenset[str]] = []
        for kind in self.busy_s:
            near = [side for side in sides if self._gpus(side) & self.gpus[kind]]
            sides = [side for side in sides if side not in near] + [frozenset({kind}).union(*near)]
        return sides

    def _gpus(self, side: frozenset[str]) -> frozenset[int]:
        return frozenset(gpu for kind in side for gpu in self.gpus[kind])

    def _work(self, side: frozenset[str]) -> float:
        """Seconds of all its GPUs together."""
        return sum(len(self.gpus[kind]) * self.busy_s[kind] for kind in side)

    def _turn_s(self, side: frozenset[str]) -> float:
        """Seconds of a step in which a side computes. Responses go to the engine that has room, so its work
        spreads over its GPUs; that of one kind takes as long as it takes."""
        return max(self._work(side) / len(self._gpus(side)), *(self.busy_s[kind] for kind in side))


def predict(
    config: Config,
    models: KnownModels,
    placement: Placement,
    response_tokens: float,
    prompt_tokens: float | None = None,
) -> Pace | None:
    """The pace with responses and prompts of these mean lengths; of prompts, None takes
    `USUAL_PROMPT_SHARE` of the longest that is allowed. None where it cannot be told: something computes on
    the CPU, in somebody else's servers or by a schedule, or a model's sizes are not known.

    Reward functions, and groups that are generated and then dropped or failed, are not in it.
    """
    if config.run.in_one_process or not all(place.gpus for place in placement.places):
        return None
    if models.policy is None or not _all_known(config, models):
        return None
    if (engine := engine_of(config).pace(config, models.policy, CARD_BYTES)) is None:
        return None
    prompt = config.data.max_prompt_tokens * USUAL_PROMPT_SHARE if prompt_tokens is None else prompt_tokens
    shares_prompts = config.trainer.share_prompts and models.unpacked is None
    lengths = _Lengths.of(config, prompt, response_tokens, shares_prompts)
    decoding = _decoding(config, engine, models.policy, lengths)
    decode_step_s = _decode_step_s(config, engine, models.policy, lengths, decoding)
    passes = list(_passes(config, models))
    per_token = sum(one.flops(lengths) for one in passes)
    version_bytes = models.policy.parameters * DTYPE_BYTES[config.model.dtype]
    trained = [model for model in (models.policy, models.critic) if model is not None]
    train_s = lengths.trained * per_token / (config.trainer.ranks * TRAINING_FLOPS_PER_S)
    snapshot_s = STATE_BYTES * sum(trained_parameters(config, m) for m in trained) / SNAPSHOT_BYTES_PER_S
    publish_s, load_s = version_bytes / PUBLISH_BYTES_PER_S, version_bytes / LOAD_BYTES_PER_S
    in_turns = config.placement.in_turns
    if in_turns:  # the trainer's state goes to the host and comes back
        load_s += 2 * snapshot_s
    return Pace(
        response_tokens=response_tokens,
        prompt_tokens=prompt,
        train_s=train_s,
        micro_batch_s=config.trainer.micro_batch_tokens
        * max(one.flops(lengths) for one in passes)
        / TRAINING_FLOPS_PER_S,
        generate_s=_generate_s(config, engine, models.policy, lengths, decoding, decode_step_s),
        decode_step_s=decode_step_s,
        decoding=decoding,
        score_s=_score_s(config, models, lengths),
        publish_s=publish_s,
        load_s=load_s,
        snapshot_s=snapshot_s,
        start_s=_start_s(config, engine, models, version_bytes) + publish_s + load_s,
        steps_per_checkpoint=_steps_per_checkpoint(config, snapshot_s, train_s + publish_s),
        takes_turns=in_turns or config.staleness.bound == 0 or config.staleness.fixed_lag is not None,
        gpus={
            kind: frozenset(gpu for place in placement.of(kind) for gpu in place.gpus)
            for kind in placement.kinds
        },
        held_gpus=placement.gpus,
    )


def _steps_per_checkpoint(config: Config, snapshot_s: float, step_s: float) -> int:
    """step_s: what a step takes at least."""
    every = config.checkpoint.every_steps
    return math.ceil(interval_s(snapshot_s, writing_s=0.0) / step_s) if every is None else every


def warnings(config: Config, pace: Pace) -> Iterator[str]:
    """Deadlines that leave the predicted pace less than twice its time. pace: that of responses of full
    length."""
    run = config.run
    silent_s = pace.snapshot_s + pace.publish_s
    stall_s = _ROOM * max(pace.step_s / STEP_STALLS, silent_s)
    if stall_s > run.stall_s:
        yield (
            f"run.stall_s={run.stall_s:g}: with responses of full length a step is expected to take about "
            f"{pace.step_s:.0f} s, and training to be silent for {silent_s:.0f} s while weights are copied "
            f"(estimated), which may look like a stall; set run.stall_s={_rounded_up(stall_s)} or more"
        )
    if _ROOM * pace.start_s > run.start_s:
        yield (
            f"run.start_s={run.start_s:g}: the start is expected to take about {pace.start_s:.0f} s "
            f"(estimated); set run.start_s={_rounded_up(_ROOM * pace.start_s)} or more"
        )


def _rounded_up(seconds: float) -> int:
    return 60 * math.ceil(seconds / 60)


def longest_affordable(pace_at: Callable[[float], Pace], config: Config) -> float | None:
    """The mean response length, in tokens, from which on `run.gpu_hours` do not pay for all of `run.steps`.
    None where they pay for responses of full length, or are not limited; 0 where they pay for none.

    pace_at: the pace at a mean length.
    """
    budget, longest = config.run.gpu_hours, float(config.rollout.max_new_tokens)
    if budget is None or pace_at(longest).gpu_hours(config.run.steps) <= budget:
        return None
    enough, too_long = 0.0, longest
    while too_long - enough > 1:
        middle = (enough + too_long) / 2
        if pace_at(middle).gpu_hours(config.run.steps) <= budget:
            enough = middle
        else:
            too_long = middle
    return float(int(enough))


@dataclass(frozen=True, slots=True)
class _Lengths:
    """Tokens of a step."""

    responses: int
    response: float
    """Of one response, on average."""
    generated: float
    prefilled: float
    """By the engines: a prompt once for its group."""
    trained: float
    """That each of the trainer's passes computes."""
    scored: float
    seen: float
    """Those that a response's token attends to, on average."""

    @classmethod
    def of(cls, config: Config, prompt: float, response: float, shares_prompts: bool) -> Self:
        groups = config.trainer.batch_groups
        responses = groups * config.rollout.group_size
        generated = groups * config.rollout.sampled * response
        return cls(
            responses=responses,
            response=response,
            generated=generated,
            prefilled=groups * prompt,
            trained=responses * response + (groups if shares_prompts else responses) * prompt,
            scored=generated + groups * config.rollout.sampled * prompt,
            seen=prompt + response / 2,
        )


@dataclass(frozen=True, slots=True)
class _Pass:
    """What the trainer does with each token of a batch: `times` forward passes, a backward pass being two and
    recomputation one."""

    model: ModelFacts
    times: float
    has_head: bool

    def flops(self, lengths: _Lengths) -> float:
        """Of a token: 2 a parameter and forward pass (Kaplan et al. 2020, arXiv 2001.08361), and 4·H a layer
        and token that it attends to (Korthikanti et al. 2022, arXiv 2205.05198). Embeddings count as the head
        that they are tied to."""
        facts = self.model
        parameters = facts.parameters - (0 if self.has_head else facts.vocab_size * facts.layer.hidden_size)
        attention = 4 * facts.layer.heads * facts.layer.head_dim * facts.layers * lengths.seen
        return self.times * (2 * parameters + attention)


def _passes(config: Config, models: KnownModels) -> Iterator[_Pass]:
    """Those of `asyncrl.trainer.step`."""
    assert models.policy is not None
    objective, critic = config.objective, config.critic
    trained = 4.0 if config.trainer.gradient_checkpointing else 3.0
    if config.trainer.lora is not None:
        trained -= 1.0  # the gradients of whole weights
    loss = POLICY_LOSSES.get(objective.policy_loss)
    advantage = ADVANTAGES.get(objective.advantage)
    has_proximal = loss is None or loss.has_proximal
    start = (
        (has_proximal and objective.proximal == "recompute" and config.trainer.mini_batches > 1)
        or (advantage is not None and advantage.needs_ratios)
        or (config.reference is not None and config.reference.where == "reward")
        or (config.teacher is not None and config.teacher.form == "sampled")
        or objective.step_size == "vcpo"
    )
    masks = (loss is not None and loss.batch_mask is not None) + (objective.entropy_share is not None)
    norms = objective.advantage in STEP_ADVANTAGES
    likelihood = config.reward.likelihood  # of texts that are about as long as the samples
    read = 0.0 if likelihood is None else 1.0 + (trained if likelihood.form == "product" else 0.0)
    times = trained + start + masks + norms + (objective.proximal == "ewma") + read
    yield _Pass(models.policy, times, has_head=True)
    for name in config.frozen.keys() & models.frozen.keys():
        yield _Pass(models.frozen[name], 1.0, has_head=True)
    if critic is not None and models.critic is not None:
        yield _Pass(models.critic, trained * critic.updates_per_policy_step + 1, has_head=False)


def _all_known(config: Config, models: KnownModels) -> bool:
    needed: list[object] = [models.policy, *models.reward]
    needed += [models.critic] if config.critic is not None else []
    needed += [getattr(models, name) for name in config.frozen]
    return None not in needed


def _decoding(config: Config, engine: EnginePace, policy: ModelFacts, lengths: _Lengths) -> int:
    rollout = config.rollout
    outstanding = (config.staleness.bound + 1) * lengths.responses
    requests = min(rollout.slots, -(-outstanding // rollout.workers))
    fit = engine.room_bytes / max(1, policy.kv_bytes_per_token * lengths.seen)
    return max(1, int(min(requests, fit)))


def _decode_step_s(
    config: Config, engine: EnginePace, policy: ModelFacts, lengths: _Lengths, decoding: int
) -> float:
    """Bound by memory: the weights, and the keys and values of every token that is attended to, are read once
    a step. Many requests take the GPU longer to compute than to read the weights for."""
    weights = policy.parameters * DTYPE_BYTES[config.model.dtype] / MEMORY_BYTES_PER_S
    computing = decoding * 2 * policy.parameters / TRAINING_FLOPS_PER_S
    keys_and_values = decoding * lengths.seen * policy.kv_bytes_per_token / MEMORY_BYTES_PER_S
    if engine.by_rows:
        return decoding * (weights + engine.step_s) + keys_and_values
    return (max(weights, computing) + keys_and_values) / config.rollout.tensor_parallel_size + engine.step_s


def _generate_s(
    config: Config,
    engine: EnginePace,
    policy: ModelFacts,
    lengths: _Lengths,
    decoding: int,
    decode_step_s: float,
) -> float:
    rollout = config.rollout
    prefill_s = (
        2 * policy.parameters * lengths.prefilled / TRAINING_FLOPS_PER_S / rollout.tensor_parallel_size
    )
    generate_s = (lengths.generated / decoding * decode_step_s + prefill_s) / rollout.workers
    if config.staleness.bound > 0:
        return generate_s
    # Nothing takes the places of what ends early: the longest response is decoded by itself.
    tail = max(0.0, rollout.max_new_tokens - lengths.response)
    return generate_s + tail * _decode_step_s(config, engine, policy, lengths, 1)


def _score_s(config: Config, models: KnownModels, lengths: _Lengths) -> dict[str, float]:
    """By every model, as if each scored every response."""
    return {
        role: 2 * facts.parameters * lengths.scored / TRAINING_FLOPS_PER_S
        for role, facts in zip(names(REWARD, len(models.reward)), models.reward, strict=True)
        if facts is not None
    }


def _start_s(config: Config, engine: EnginePace, models: KnownModels, version_bytes: int) -> float:
    """All roles start side by side, from the same disk, but engines that take turns with the trainer after
    it."""
    value_bytes = DTYPE_BYTES[config.model.dtype]
    read = sum(facts.parameters for facts in models.trained.values()) * value_bytes
    trainer_s = TRAINER_START_S + read / DISK_BYTES_PER_S
    engine_s = engine.start_s + (version_bytes / DISK_BYTES_PER_S if engine.reads_weights else 0.0)
    scoring = [
        TRAINER_START_S + facts.parameters * DTYPE_BYTES[model.dtype] / DISK_BYTES_PER_S
        for facts, model in zip(models.reward, config.reward.models, strict=True)
        if facts is not None
    ]
    loop_s = trainer_s + engine_s if config.placement.in_turns else max(trainer_s, engine_s)
    return max([loop_s, *scoring])
