"""What a config implies, computed before anything runs: processes, sizes, bounds, memory. Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import cast

from asyncrl.cluster.kinds import role_sets
from asyncrl.config import Config
from asyncrl.core.cursor import epoch_rows
from asyncrl.decoders.facts import ModelFacts
from asyncrl.plan.disk import Disk, estimate_disk
from asyncrl.plan.facts.models import KnownModels
from asyncrl.plan.memory.estimate import GpuLoad, Memory, estimate_memory, gpu_loads, host_bytes
from asyncrl.plan.pace import Pace, longest_affordable, predict
from asyncrl.plan.resources import Place, Placement
from asyncrl.roles import ROLLOUT
from asyncrl.rollout.engines.spec import engine_of

MEAN_SHARES = (1 / 4, 1 / 2, 1.0)
"""Mean lengths of responses, in `rollout.max_new_tokens`, that a run's pace is predicted for."""


@dataclass(frozen=True, slots=True)
class Processes:
    """Equal processes of the run."""

    role: str
    count: int
    threads: int
    """CPU threads that each computes with; 0 for those without a setting."""
    gpus: tuple[int, ...] = ()
    """The GPUs that they compute on."""
    cores: tuple[int, ...] = ()
    """The cores that they stay on, each on its share."""


@dataclass(frozen=True, slots=True)
class Outline:
    processes: tuple[Processes, ...]
    memory: tuple[Memory, ...]
    """Of the processes whose models' sizes are known."""
    gpus: tuple[GpuLoad, ...]
    rows: int | None
    """Usable prompts; None where the dataset is not known."""
    longest_prompt_tokens: int
    """The largest allowed (`data.max_prompt_tokens`) where the dataset is not known."""
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
    epochs: float | None
    """Passes over the dataset in `run.steps` steps, when nothing is dropped; None where there are several."""
    paces: tuple[Pace, ...]
    """Predicted for responses of `MEAN_SHARES` of the longest that is allowed; none where no pace can be told
    (`pace.predict`)."""
    affordable_tokens: float | None
    """The mean response length from which on `run.gpu_hours` do not pay for all steps; None where they pay
    for responses of full length, or where there is no limit or no pace."""
    host_memory_bytes: int | None
    """Estimate of everything that does not lie on a GPU."""
    disk: Disk | None
    """Estimate of what the run directory takes; None where a trained model's size is not known."""
    kv_sequences: int | None
    """Sequences of full length whose keys and values one engine holds; None where it has room for all slots
    by construction, or where the model's sizes are not known."""

    @property
    def threads(self) -> int:
        return sum(p.count * p.threads for p in self.processes)


def outline(
    config: Config,
    placement: Placement,
    models: KnownModels,
    rows: int | None,
    longest_prompt_tokens: int | None,
    gpu_bytes: Sequence[int] = (),
    mean_prompt_tokens: float | None = None,
) -> Outline:
    """What `config` implies for `rows` usable prompts of `mean_prompt_tokens`, and up to
    `longest_prompt_tokens`, tokens, on GPUs of `gpu_bytes` each. What is not known is None, and what hangs on
    it stays open."""
    trainer, rollout, eta = config.trainer, config.rollout, config.staleness.bound
    responses = trainer.batch_groups * rollout.group_size
    response_tokens = responses * rollout.max_new_tokens
    outstanding = (eta + 1) * trainer.batch_groups
    longest = config.data.max_prompt_tokens if longest_prompt_tokens is None else longest_prompt_tokens
    memory = estimate_memory(config, placement, models, longest, gpu_bytes)
    pace_at = partial(predict, config, models, placement, prompt_tokens=mean_prompt_tokens)
    paces = tuple(p for share in MEAN_SHARES if (p := pace_at(share * rollout.max_new_tokens)) is not None)
    return Outline(
        processes=tuple(_processes(config, placement)),
        memory=memory,
        gpus=gpu_loads(placement, memory, gpu_bytes, in_turns=config.placement.in_turns),
        rows=rows,
        longest_prompt_tokens=longest,
        responses_per_step=responses,
        max_response_tokens_per_step=response_tokens,
        max_tokens_per_step=response_tokens + responses * longest,
        updates_per_step=trainer.mini_batches,
        groups_per_update=trainer.batch_groups / trainer.mini_batches,
        total_updates=config.run.steps * trainer.mini_batches,
        max_staleness_updates=eta * trainer.mini_batches,
        max_groups_outstanding=outstanding,
        max_responses_outstanding=outstanding * rollout.sampled,
        slots=rollout.workers * rollout.slots,
        epochs=_epochs(config, rows),
        paces=paces,
        affordable_tokens=longest_affordable(cast(Callable[[float], Pace], pace_at), config)
        if paces
        else None,
        host_memory_bytes=host_bytes(placement, memory),
        disk=estimate_disk(config, models),
        kv_sequences=_kv_sequences(config, placement, models.policy, memory, longest),
    )


def _epochs(config: Config, rows: int | None) -> float | None:
    if rows is None or config.data.mix:
        return None
    return config.run.steps * config.trainer.batch_groups / epoch_rows(rows, config.epoch_multiple)


def mix_epochs(config: Config, rows: Sequence[int]) -> list[float]:
    """Passes over each dataset of `data.mix`, of so many rows, in `run.steps` steps, when nothing is
    dropped."""
    steps = [0.0] * len(rows)
    for step in range(config.run.steps):
        present = [i for i, each in enumerate(config.data.mix) if each.has_step(step)]
        weights = sum(config.data.mix[i].weight for i in present)
        for i in present:
            steps[i] += config.data.mix[i].weight / weights
    return [n * config.trainer.batch_groups / count for n, count in zip(steps, rows, strict=True)]


def _processes(config: Config, placement: Placement) -> Iterator[Processes]:
    if config.run.in_one_process:
        yield Processes(config.run.mode, 1, config.trainer.threads, _gpus(placement.places))
    else:
        yield Processes("launcher", 1, 0)
        for of in role_sets(config):
            places = placement.of(of.name)
            cores = tuple(core for place in places for core in place.cores)
            yield Processes(of.name, len(of.roles), of.threads, _gpus(places), cores)
    if config.reward.called or config.reward.format.pattern is not None:
        yield Processes("reward functions", config.rollout.workers * config.reward.first_workers, 0)


def _gpus(places: Iterable[Place]) -> tuple[int, ...]:
    return tuple(sorted({gpu for place in places for gpu in place.gpus}))


def _kv_sequences(
    config: Config,
    placement: Placement,
    model: ModelFacts | None,
    memory: Iterable[Memory],
    longest_prompt: int,
) -> int | None:
    """Of an engine that takes as much of its GPUs as it is told, not as much as the slots need."""
    gpus = placement.of(ROLLOUT)[0].gpus
    if not gpus or model is None or engine_of(config).gpu_share(config) is None:
        return None
    room = len(gpus) * next(m.parts["KV cache"] for m in memory if m.kind == ROLLOUT)
    sequence_tokens = config.rollout.context_tokens(longest_prompt)
    return max(0, room // max(1, sequence_tokens * model.kv_bytes_per_token))
