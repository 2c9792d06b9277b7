"""The run's settings as one typed tree."""

from __future__ import annotations

import ipaddress
from typing import Literal

from pydantic import Field

from asyncrl.config.data import DataConfig, SftConfig
from asyncrl.config.evaluation import HELD_OUT, EvaluationConfig
from asyncrl.config.objective import (
    CriticConfig,
    ObjectiveConfig,
    ReferenceConfig,
    ReplayConfig,
    TeacherConfig,
)
from asyncrl.config.observe import ObserveConfig
from asyncrl.config.reward import RewardConfig
from asyncrl.config.rollout import RolloutConfig
from asyncrl.config.run import CheckpointConfig, NetworkConfig, PlacementConfig, RunConfig
from asyncrl.config.sweep import SweepConfig
from asyncrl.config.trainer import TrainerConfig
from asyncrl.section import Section


class ModelConfig(Section):
    path: str
    """A folder with a Hugging Face decoder-only model and its tokenizer, or a hub name."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """What the model computes in, in engine and trainer. The optimizer keeps float32 weights either way."""
    attn_implementation: Literal["auto", "varlen", "sdpa", "eager", "flash_attention_2"] = "auto"
    """Attention kernel of the trainer. `varlen`: torch's kernel for sequences of any length, without padding
    and masks (on a CPU a slow reference of it). `auto`: `varlen` on a GPU, if it can compute what the model
    wants in `model.dtype`, else `sdpa`, and `eager` for models that cap their attention's scores (Gemma 2).
    The embedded engine uses `sdpa` where the model has it, and caps where the model does."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model."""


class StalenessConfig(Section):
    max_staleness: int = Field(4, ge=0)
    """η: no token older than this many versions contributes to a gradient. 0 is synchronous, 1 one step
    off."""
    on_stale: Literal["wait", "mask", "drop"] = "wait"
    """A group that would break the bound is waited for in time, loses its old tokens, or is dropped and its
    prompt sampled again."""
    fixed_lag: int | None = Field(None, ge=0)
    """For experiments: hold groups until all their tokens are exactly this many versions old (in the first
    steps: of version 0), however fast anything is. Each step waits until its version's weights have sampled
    their share, so sampling and training do not overlap; null lets them."""

    @property
    def bound(self) -> int:
        """Largest staleness of a trained token."""
        return self.max_staleness if self.fixed_lag is None else self.fixed_lag


class WeightsConfig(Section):
    transport: str = "auto"
    """How weight versions get from the trainer to the engines. `shm`: through this host's shared memory.
    `ipc`: on one host from GPU to GPU, the trainer's keeping a copy of the version; without GPUs, through
    shared memory. `tcp`: to other hosts, to each once, as what has changed where that is less, and there
    through its shared memory. `collective`: broadcast to all engines at once, by NCCL where trainer and
    engines have a GPU each, else by gloo; plain, so in a network of your own alone. `auto`: `shm` where
    `network.bind` is a loopback address, else `tcp`. Or your own, `package.module:name` or
    `path/file.py:name` (`asyncrl.weights.transport`)."""
    ack_timeout_s: float = Field(120.0, gt=0)
    """Longest wait for an engine to take a weight version, before it counts as a stall (`run.on_stall`)."""
    canary: bool = True
    """After each update, compare every tensor that a vLLM engine holds with what was published, and have
    engines and servers score a text that the trainer scores too. The run stops when they differ."""


class Config(Section):
    """All settings of a run."""

    run: RunConfig = RunConfig()
    model: ModelConfig
    data: DataConfig
    rollout: RolloutConfig = RolloutConfig()
    reward: RewardConfig
    staleness: StalenessConfig = StalenessConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    trainer: TrainerConfig = TrainerConfig()
    critic: CriticConfig | None = None
    """The critic, for the advantages `gae`, `vtrace` and `turn_gae`; null is none."""
    reference: ReferenceConfig | None = None
    """A frozen policy to stay close to; null is none."""
    teacher: TeacherConfig | None = None
    """A policy whose judgement of each sampled token is learnt from (on-policy distillation); null is
    none."""
    sft: SftConfig | None = None
    """Demonstrations to learn from beside the samples; null is none."""
    replay: ReplayConfig | None = None
    """Rare successes of earlier steps to learn from once more, beside the samples; null is none."""
    evaluation: EvaluationConfig | None = None
    """Scores on held-out prompts beside the training; null is none."""
    weights: WeightsConfig = WeightsConfig()
    placement: PlacementConfig = PlacementConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    network: NetworkConfig = NetworkConfig()
    observe: ObserveConfig = ObserveConfig()
    sweep: SweepConfig | None = None
    """What `asyncrl sweep` compares by this config; null is nothing."""

    @property
    def transport(self) -> str:
        """`weights.transport`, decided where it is `auto`: nobody elsewhere reaches a loopback address."""
        if self.weights.transport != "auto":
            return self.weights.transport
        return "shm" if ipaddress.ip_address(self.network.bind).is_loopback else "tcp"

    @property
    def guests(self) -> dict[str, int]:
        """Most of each kind that may join the run, by setting."""
        rollout, scoring = self.rollout, self.reward.guests
        of_rollout = {"rollout.guests": rollout.guests, "rollout.episode_guests": rollout.episode_guests}
        return of_rollout | {"reward.guests": scoring}

    @property
    def weights_stay_here(self) -> bool:
        """Whether the transport that was asked for is for engines on the trainer's host alone."""
        return self.weights.transport in ("shm", "ipc")

    @property
    def frozen(self) -> dict[str, ReferenceConfig | TeacherConfig]:
        """The policies that the trainer computes and does not train, by section."""
        teacher = None if self.teacher is None or self.teacher.path is None else self.teacher
        sections = {"reference": self.reference, "teacher": teacher}
        return {name: section for name, section in sections.items() if section is not None}

    @property
    def lessons(self) -> set[str]:
        """Of the sections of what a policy may learn from beside its samples (`trainer.lessons`), those that
        there are, by their keys."""
        sections = {
            "reference": self.reference,
            "teacher": self.teacher,
            "reward.likelihood": self.reward.likelihood,
            "sft": self.sft,
            "replay": self.replay,
        }
        return {key for key, section in sections.items() if section is not None}

    @property
    def may_have_lessons(self) -> bool:
        """Whether `trainer.lessons` is asked for any: some have no section, but settings of other ones."""
        return bool(self.lessons or self.objective.entropy_coef or self.rollout.choose != "first")

    def needs_checkpoint(self, version: int) -> bool:
        """Whether there must be one, whatever the interval: at the end, and of what is compared."""
        compared = self.evaluation is not None and self.checkpoint.best_of is not None
        due = self.evaluation is not None and self.evaluation.is_due(version, self.run.steps)
        return version == self.run.steps or (compared and due)

    @property
    def scored_sets(self) -> DataConfig | None:
        """What `evaluation.sets` are read by; None where held-out rows are scored."""
        has_own = self.evaluation is not None and self.evaluation.sets
        return self.evaluation.data(self.data) if self.evaluation is not None and has_own else None

    @property
    def scored_data(self) -> list[DataConfig]:
        """What is read for evaluation alone: `evaluation.sets`, and `evaluation.suites`."""
        evaluation, sets = self.evaluation, self.scored_sets
        suites = [evaluation.suite_data(self.data)] if evaluation is not None and evaluation.suites else []
        return ([] if sets is None else [sets]) + suites

    @property
    def scored_by_rewards(self) -> list[str]:
        """Of the sets that models are scored on, those that the run's own rewards score."""
        if self.scored_sets is not None:
            return self.scored_sets.names
        only_suites = self.evaluation is not None and self.evaluation.suites and not self.data.held_out_rows
        return [] if only_suites else self.data.names or [HELD_OUT]

    @property
    def scored_names(self) -> list[str]:
        """Of the sets that models are scored on: the suites come last."""
        suites = [] if self.evaluation is None else self.evaluation.suites
        return self.scored_by_rewards + [suite.name for suite in suites]

    @property
    def learns_without_rewards(self) -> bool:
        """Whether something teaches responses that nothing scores."""
        return self.teacher is not None or self.reward.likelihood is not None

    @property
    def epoch_multiple(self) -> int:
        """An epoch has a multiple of so many rows."""
        return self.trainer.batch_groups if self.data.drop_last else 1
