"""Adapters of a trainer's models (`trainer.lora`), and what their training needs in another form then."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedTokenizerBase

from asyncrl.config import Config
from asyncrl.trainer.critic.model import Critic
from asyncrl.trainer.learner import Learner
from asyncrl.trainer.lora.adapter import Adapter
from asyncrl.trainer.lora.learner import AdaptedLearner
from asyncrl.trainer.lora.reference import AdapterOff
from asyncrl.trainer.lora.saving import AdapterFolder
from asyncrl.trainer.models.policy import Policy
from asyncrl.trainer.ranks import Ranks
from asyncrl.weights.published import WholeWeights


@dataclass(frozen=True, slots=True)
class Adapters:
    """Of the models that are trained. folder: what the policy's checkpoints have."""

    policy: Adapter
    critic: Adapter | None
    folder: AdapterFolder

    def weights(self) -> WholeWeights:
        """What engines are given."""
        return self.policy.weights()

    def of(self, model: nn.Module) -> Adapter:
        """That of one of the models."""
        return next(each for each in (self.policy, self.critic) if each is not None and each.trained is model)

    def learner(self, make: Callable[[nn.Module], Learner]) -> Callable[[nn.Module], Learner]:
        """make: puts what is trained of a model under an optimizer."""
        return lambda model: AdaptedLearner(make(model), self.of(model))

    def base(self, ranks: Ranks) -> AdapterOff:
        """The policy as it began."""
        return AdapterOff(self.policy, ranks)


def adapt(
    policy: Policy,
    critic: Critic | None,
    tokenizer: PreTrainedTokenizerBase,
    config: Config,
) -> Adapters:
    """From now on the adapters alone are trained (and the critic's head). Raises `ModelError`."""
    lora, seed = config.trainer.lora, config.run.seed
    assert lora is not None
    adapter = Adapter(policy, lora, seed)
    of_critic = None if critic is None else Adapter(critic, lora, seed)
    return Adapters(adapter, of_critic, AdapterFolder(adapter, tokenizer, config))
