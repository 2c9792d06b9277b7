"""A training step with a critic."""

from __future__ import annotations

from dataclasses import replace

from asyncrl.config import Config
from asyncrl.trainer.critic.bootstrap import make_bootstrap
from asyncrl.trainer.critic.update import CriticUpdate
from asyncrl.trainer.learner import Learner
from asyncrl.trainer.step import TrainStep


def with_critic(step: TrainStep, critic: Learner, config: Config) -> TrainStep:
    """As `critic` says."""
    assert config.critic is not None
    update = CriticUpdate(critic, step.ranks, config.critic)
    return replace(
        step,
        lr=replace(step.lr, frozen_steps=config.critic.warmup_steps),
        critic=update,
        critic_lr=replace(step.lr, peak=config.critic.lr),
        bootstrapped=make_bootstrap(config, update, step.packing, step.ranks),
    )
