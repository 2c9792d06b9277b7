"""What is asked of an engine beside its work: where it can be used, what it needs, how it is made."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from asyncrl.config import Config
from asyncrl.config.rollout import ENGINES
from asyncrl.decoders.facts import DTYPE_BYTES, ModelFacts
from asyncrl.errors import ConfigError
from asyncrl.rollout.engines.base import Engine
from asyncrl.specs import Spec, find_spec, those

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

Device = Literal["cpu", "cuda"]
Parts = dict[str, int]
"""Bytes of memory, by what they hold."""

SHARES_GPU = "ASYNCRL_SHARES_GPU"
"""Environment variable of a rollout worker that is not alone on its GPUs."""
READS_WEIGHTS = "ASYNCRL_READS_WEIGHTS"
"""Of a process whose engine gets no weight version, and so has to begin with the model's own."""
_FLOAT32 = 4


@dataclass(frozen=True, slots=True)
class Card:
    """A GPU that an engine computes on."""

    n_bytes: int
    """Its memory."""
    context_bytes: int
    """What CUDA and its libraries take of it for each process."""
    is_shared: bool
    """Whether others compute on it."""


@dataclass(frozen=True, slots=True)
class EnginePace:
    """Of an engine on GPUs, estimated."""

    start_s: float
    """From its process's start to its readiness, without reading weights: imports, process groups,
    compiling."""
    step_s: float
    """Of a decode step, beside reading weights, keys and values: scheduling, sampling, launches."""
    reads_weights: bool = True
    """Whether it reads the model at its start. Otherwise it waits for the trainer's weights."""
    room_bytes: float = math.inf
    """Of keys and values, on all its GPUs."""
    by_rows: bool = False
    """Whether it computes a forward for each request."""


class EngineSpec(Spec):
    """All that is asked of an engine beside its `Engine` (`asyncrl.specs`). What is not said otherwise is so
    for one that computes in its worker's process, by itself."""

    folder = ENGINES
    key = "rollout.engine"
    samples = True
    """False: it only takes its time, and needs no model, no device and no memory."""
    starts_processes = False
    """Whether it starts processes of its own, so that its worker must not be forked from another itself."""
    computes_here = True
    """Whether its workers compute. Otherwise others do, somewhere else, or nobody."""
    is_stepped = False
    """Whether its engines are `SteppedEngine`s, as `run.mode=inline` needs them."""
    why_not_stepped = "steps its engine by hand, and {} goes on by itself"
    """Where they are not."""
    splits_models = False
    """Whether `rollout.tensor_parallel_size` may be more than 1."""
    resubmits = False
    """Whether it can do `rollout.kv_on_update=resubmit`."""
    sleeps = False
    """Whether its engines can give up their memory (`Engine.sleep`)."""
    why_no_sleep = "{} cannot"
    """Where they cannot."""
    tells_kept = False
    """Whether it tells what each token was sampled among under top-p and top-k."""
    may_stay_initial = False
    """Whether its engines begin with the model's own weights where `READS_WEIGHTS` is set."""
    scores_canary = False
    """Whether it proves by the canary of a weight version that it computes with it as the trainer does. One
    that computes with the very tensors that it is given has nothing to prove."""

    def make(self, config: Config, longest_prompt_tokens: int, *, shares_gpu: bool) -> Engine:
        """Its weights are not worth sampling from before the first update (but see `may_stay_initial`).
        Called in the main thread.

        shares_gpu: whether others compute on its GPUs.
        """
        raise NotImplementedError

    def for_evaluation(self, config: Config) -> Config:
        """The config of an engine that scores versions beside the training, one at a time. Raises
        `ConfigError` where there can be none."""
        if not self.samples or not self.computes_here:
            able = those(EngineSpec, lambda spec: spec.samples and spec.computes_here)
            raise ConfigError(
                f"evaluation scores a version by an engine of its own, and {self.key}="
                f"{config.rollout.engine} has none; use {able}, or score checkpoints with `asyncrl eval`"
            )
        return config

    def check_device(self, config: Config, device: Device) -> None:
        """Raises `NotHereError` where a package that it needs is not installed, `ConfigError` where it cannot
        be as it is set on this device."""

    def check_machine(self, config: Config) -> None:
        """Raises `ConfigError` where this machine is not as its settings say."""

    def check_model(self, config: Config, structure: PreTrainedConfig, device: Device) -> None:
        """Raises `ConfigError` for a model that it cannot be given weights of, or computes wrongly."""

    def check_servers(self, config: Config, structure: PreTrainedConfig, longest_prompt_tokens: int) -> None:
        """The last check before a run starts: raises `ConfigError` where what is to compute for it does not
        answer, or cannot be used."""

    def look_at_decoding(self, config: Config, model: ModelFacts) -> str | None:
        """What may surprise about how it decodes this model. Raises `ConfigError` where it cannot as it is
        set."""

    def memory(
        self, config: Config, model: ModelFacts | None, sequence_tokens: int, card: Card | None
    ) -> tuple[Parts, Parts] | None:
        """Of one engine, estimated, on each of its GPUs: where it computes, and in host memory besides. None
        where that is not known.

        model: None where its sizes are not known. sequence_tokens: the longest prompt with its response.
        card: one of its GPUs, None where it computes on the CPU.
        """
        if model is None:
            return None
        weights, slots = model.parameters * DTYPE_BYTES[config.model.dtype], config.rollout.slots
        kept = sequence_tokens * model.kv_bytes_per_token + _FLOAT32 * model.state_values
        # Decoding by rows keeps what a row goes on from beside what it has been filled with.
        of_all = (slots + config.rollout.kept) * kept if model.by_rows is None else slots * 2 * kept
        parts = {
            "weights": weights,
            "incoming weights": weights,
            "KV cache": of_all,
            "logits": 2 * _FLOAT32 * slots * model.vocab_size,
        }
        if card is None:
            return parts, {}
        return parts | {"CUDA": card.context_bytes}, {"incoming weights": weights}

    def gpu_share(self, config: Config) -> tuple[str, float] | None:
        """The setting by which it takes a share of each of its GPUs, whole, and that share. None where it
        takes what it needs."""

    def pace(self, config: Config, model: ModelFacts, card_bytes: float) -> EnginePace | None:
        """On GPUs with so many bytes of memory; None where it cannot be told."""

    def sweep(self, config: Config) -> None:
        """The launcher's, after a run: leave nothing behind, whatever has ended the worker."""

    def impossible(self, config: Config) -> Iterator[str]:
        run, rollout = config.run, config.rollout
        chosen = f"rollout.engine={rollout.engine}"
        for key, value in config.objective.of_responses.items():
            if rollout.truncation and not self.tells_kept:
                yield (
                    f"objective.{key}={value} weighs whole responses by their ratios, and "
                    f"{rollout.truncation} renormalises what is sampled from over tokens that {chosen} does "
                    "not tell: the ratios of long responses would vanish even on policy; use rollout.top_p=1 "
                    "and rollout.top_k=0, or "
                    f"{those(EngineSpec, lambda spec: spec.tells_kept)}"
                )
        if run.in_one_process and not self.is_stepped:
            able = those(EngineSpec, lambda spec: spec.is_stepped)
            yield f"run.mode={run.mode} {self.why_not_stepped.format(chosen)}; use {able}, or run.mode=async"
        if config.placement.in_turns and not self.sleeps:
            able = those(EngineSpec, lambda spec: spec.sleeps)
            yield (
                "placement.colocate=turns has engines give up their memory for the trainer, and "
                f"{self.why_no_sleep.format(chosen)}; use {able}, or placement.colocate=auto"
            )
        if rollout.tensor_parallel_size > 1 and not self.splits_models:
            able = those(EngineSpec, lambda spec: spec.splits_models)
            yield (
                f"rollout.tensor_parallel_size={rollout.tensor_parallel_size}: only {able} splits a model; "
                f"use it instead of {chosen}, or rollout.tensor_parallel_size=1"
            )
        if rollout.kv_on_update == "resubmit" and not self.resubmits:
            able = those(EngineSpec, lambda spec: spec.resubmits)
            yield (
                f"rollout.kv_on_update=resubmit is for {able}; {chosen} need not take requests back to "
                "compute them anew: use rollout.kv_on_update=recompute, which samples from the same "
                "distribution"
            )


def engine_of(config: Config) -> EngineSpec:
    """What `rollout.engine` names. Raises `ConfigError` where there is none."""
    return find_spec(EngineSpec, ENGINES, config.rollout.engine)


def make_engine(config: Config, longest_prompt_tokens: int, *, shares_gpu: bool = False) -> Engine:
    """Build `rollout.engine`.

    shares_gpu: others compute on its GPUs, as far as its caller knows; the launcher of a run knows more.
    """
    return engine_of(config).make(
        config, longest_prompt_tokens, shares_gpu=shares_gpu or SHARES_GPU in os.environ
    )


def engine_device(config: Config) -> Device:
    """Where an engine in this process computes."""
    import torch

    chosen = config.rollout.device
    return "cuda" if chosen == "cuda" or (chosen == "auto" and torch.cuda.is_available()) else "cpu"
