"""The models of a trainer and its training step, put together by the config."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import nn
from transformers import PreTrainedTokenizerBase

from asyncrl.config import Config
from asyncrl.data.tokenizer import load_tokenizer
from asyncrl.trainer.advantages import AdvantageEstimator
from asyncrl.trainer.learner import Learner
from asyncrl.trainer.lesson import Lesson
from asyncrl.trainer.models.packed import common_packing
from asyncrl.trainer.models.policy import Policy, load_policy
from asyncrl.trainer.packing.mini_batch import Packing
from asyncrl.trainer.policy_update import PolicyUpdate
from asyncrl.trainer.ranks import OneRank, Ranks
from asyncrl.trainer.saving import ModelFolder
from asyncrl.trainer.schedule import Schedule
from asyncrl.trainer.state import Stateful
from asyncrl.trainer.step import TrainStep
from asyncrl.work import unhurried

if TYPE_CHECKING:
    from asyncrl.trainer.averaged import AveragedPolicy
    from asyncrl.trainer.critic.model import Critic
    from asyncrl.trainer.lora.make import Adapters


@dataclass(frozen=True, slots=True)
class Models:
    """The models that are trained. folder: what the policy's checkpoints have."""

    policy: Policy
    critic: Critic | None
    tokenizer: PreTrainedTokenizerBase
    folder: ModelFolder
    adapters: Adapters | None = None


def load_models(config: Config) -> Models:
    """Raises `ModelError` for models that this backend would not train right, or not together."""
    with unhurried("loading the model"):
        policy = load_policy(config)
    tokenizer = load_tokenizer(config.model)
    critic = None
    if config.critic is not None:
        from asyncrl.trainer.critic.model import load_critic

        with unhurried("loading the critic"):
            critic = load_critic(config)
    if config.trainer.lora is None:
        return Models(policy, critic, tokenizer, ModelFolder(policy.model, tokenizer))
    from asyncrl.trainer.lora.make import adapt

    adapters = adapt(policy, critic, tokenizer, config)
    return Models(policy, critic, tokenizer, adapters.folder, adapters)


def make_training(
    config: Config, models: Models, learner: Callable[[nn.Module], Learner], ranks: Ranks
) -> tuple[TrainStep, dict[str, Stateful]]:
    """The training step of these models, and what it changes: the parts of a checkpoint, by name.

    learner: puts a model under an optimizer.
    """
    if models.adapters is not None:
        learner = models.adapters.learner(learner)
    policy = learner(models.policy)
    critic = None if models.critic is None else learner(models.critic)
    averaged = None
    if config.objective.proximal == "ewma":
        from asyncrl.trainer.averaged import AveragedPolicy

        averaged = AveragedPolicy(models.policy, config.objective.ewma_decay)
    lessons: list[Lesson] = []
    if config.may_have_lessons:
        from asyncrl.trainer.lessons.make import load_lessons, make_lessons

        base = None if models.adapters is None else models.adapters.base(ranks)
        lessons = load_lessons(config, ranks, base)
    together = [models.policy, models.critic, *(lesson.model for lesson in lessons)]
    packing = common_packing([m for m in together if m is not None], config.trainer.micro_batch_tokens)
    if config.may_have_lessons:
        lessons += make_lessons(config, policy, packing, ranks)
    step = make_step(config, policy, packing, ranks, critic=critic, lessons=lessons, averaged=averaged)
    parts: dict[str, Stateful | None] = {"policy": policy, "critic": critic, "average": averaged}
    kept = {name: part for lesson in lessons for name, part in lesson.parts.items()}
    return step, {name: part for name, part in parts.items() if part is not None} | kept


def make_step(
    config: Config,
    policy: Learner,
    packing: Packing,
    ranks: Ranks | None = None,
    *,
    critic: Learner | None = None,
    lessons: Sequence[Lesson] = (),
    averaged: AveragedPolicy | None = None,
) -> TrainStep:
    """The training step by the config's settings, which are read here and given to whom they concern."""
    trainer, ages = config.trainer, config.staleness.max_staleness + 1
    ranks = ranks or OneRank(packing.device)
    step = TrainStep(
        seed=config.run.seed,
        max_staleness=config.staleness.max_staleness,
        max_length=config.rollout.max_new_tokens,
        mini_batches=trainer.mini_batches,
        packing=packing,
        ranks=ranks,
        advantages=AdvantageEstimator(config.objective),
        policy=PolicyUpdate(policy, ranks, config.objective, ages=ages, lessons=lessons, averaged=averaged),
        lr=Schedule(
            trainer.lr, trainer.lr_schedule, trainer.warmup_steps, config.run.steps, trainer.lr_min_share
        ),
        lessons=lessons,
        mask_truncated=config.objective.mask_truncated,
    )
    if critic is None:
        return step
    from asyncrl.trainer.critic.make import with_critic

    return with_critic(step, critic, config)
