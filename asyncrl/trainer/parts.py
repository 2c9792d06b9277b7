"""The models of a trainer and its training step, put together by the config."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from asyncrl.config import Config
from asyncrl.trainer.learner import Learner
from asyncrl.trainer.models.critic import Critic, load_critic
from asyncrl.trainer.models.ewma import AveragedPolicy
from asyncrl.trainer.models.packed import common_packing
from asyncrl.trainer.models.policy import Policy, load_policy
from asyncrl.trainer.models.reference import load_reference
from asyncrl.trainer.ranks import Ranks
from asyncrl.trainer.state import Stateful
from asyncrl.trainer.step import TrainStep
from asyncrl.work import unhurried


@dataclass(frozen=True, slots=True)
class Models:
    """The models that are trained."""

    policy: Policy
    critic: Critic | None


def load_models(config: Config) -> Models:
    """Raises `ModelError` for models that this backend would not train right, or not together."""
    with unhurried("loading the model"):
        policy = load_policy(config)
    if config.critic is None:
        return Models(policy, None)
    with unhurried("loading the critic"):
        return Models(policy, load_critic(config))


@dataclass(frozen=True, slots=True)
class Trained:
    """What training changes."""

    policy: Learner
    critic: Learner | None
    averaged: AveragedPolicy | None

    def parts(self) -> dict[str, Stateful]:
        """Of the checkpoint, by name."""
        parts = {"policy": self.policy, "critic": self.critic, "average": self.averaged}
        return {name: part for name, part in parts.items() if part is not None}


def make_trained(config: Config, models: Models, learner: Callable[[nn.Module], Learner]) -> Trained:
    """`learner`: puts a model under an optimizer."""
    averages = config.objective.proximal == "ewma"
    return Trained(
        learner(models.policy),
        None if models.critic is None else learner(models.critic),
        AveragedPolicy(models.policy, config.objective.ewma_decay) if averages else None,
    )


def make_step(config: Config, models: Models, trained: Trained, ranks: Ranks) -> TrainStep:
    """The training step of these models."""
    if config.reference is None:
        reference = None
    else:
        with unhurried("loading the reference"):
            reference = load_reference(config, ranks)
    together = [models.policy, models.critic, None if reference is None else reference.policy]
    return TrainStep(
        trained.policy,
        common_packing([model for model in together if model is not None], config.trainer.micro_batch_tokens),
        config,
        ranks,
        critic=trained.critic,
        reference=reference,
        averaged=trained.averaged,
    )
