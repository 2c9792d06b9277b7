"""The models of a run: found, checked against each other, and measured without their weights."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from asyncrl.config import Config
from asyncrl.decoders.facts import ModelFacts
from asyncrl.errors import ConfigError
from asyncrl.plan.facts.model import (
    FoundModel,
    ModelSource,
    check_decoder_only,
    check_weights,
    find_model,
    find_policy,
    find_tokenizer,
    model_facts,
)
from asyncrl.plan.facts.reward import RewardModelFacts, find_reward_model, load_template, reward_model_facts
from asyncrl.plan.facts.shapes import known_model
from asyncrl.plan.facts.training_form import training_form
from asyncrl.plan.findings import Findings
from asyncrl.trainer.backend import backend_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


_DIFFERING_SHARE = 0.01
"""Of a tokenizer's tokens, those that a model of the same family may know by other ids."""


@dataclass(frozen=True, slots=True)
class KnownModels:
    """The sizes of a run's models; None for those that it does not have, or that are not known."""

    policy: ModelFacts | None
    critic: ModelFacts | None = None
    reference: ModelFacts | None = None
    reward: tuple[RewardModelFacts | None, ...] = ()
    """Of each of `reward.models`."""
    teacher: ModelFacts | None = None

    @property
    def trained(self) -> dict[str, ModelFacts]:
        """Those that the trainer computes, which share its micro-batches; by name."""
        models = {"policy": self.policy, "critic": self.critic, **self.frozen}
        return {name: facts for name, facts in models.items() if facts is not None}

    @property
    def frozen(self) -> dict[str, ModelFacts]:
        """Of `Config.frozen`, those that are known."""
        models = {"reference": self.reference, "teacher": self.teacher}
        return {name: facts for name, facts in models.items() if facts is not None}

    @property
    def unpacked(self) -> str | None:
        """Why the trainer gives every sequence a row of its own; None where rows hold several."""
        return next((facts.form.unpacked for facts in self.trained.values() if facts.form.unpacked), None)


def look_for_models(config: Config, findings: Findings) -> tuple[KnownModels, PreTrainedTokenizerBase | None]:
    """What is known of the models, and the policy's tokenizer."""
    policy = findings.of(lambda: find_policy(config.model))
    facts = _facts(policy or known_model("model.path", config.model.path), config, findings, has_head=True)
    tokenizer = None if policy is None else findings.of(lambda: find_tokenizer(policy))
    critic = None
    if config.critic is not None:
        critic = _beside(facts, "critic.path", config.critic.path, config, findings)
    frozen = {
        name: _beside(facts, f"{name}.path", section.path, config, findings, tokenizer)
        for name, section in config.frozen.items()
    }
    reward = tuple(_reward_model(i, config, findings) for i in range(len(config.reward.models)))
    return KnownModels(facts, critic, reward=reward, **frozen), tokenizer


def _facts(
    model: FoundModel | None, config: Config, findings: Findings, *, has_head: bool
) -> ModelFacts | None:
    if model is None:
        return None
    findings.of(lambda: check_weights(model))
    facts = findings.of(lambda: model_facts(model, config.model.dtype))
    if facts is None or not backend_of(config).computes:
        return facts
    form = findings.of(lambda: training_form(model, config, has_head=has_head))
    return facts if form is None else replace(facts, form=form)


def _beside(
    policy: ModelFacts | None,
    key: str,
    path: str | None,
    config: Config,
    findings: Findings,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> ModelFacts | None:
    """A decoder that reads what the policy reads: another copy of the policy where no path is given.
    tokenizer: the policy's, where the model is to know its tokens from the start."""
    if path is None:
        return policy
    advice = f"leave {key} out to start from a copy of the policy"
    if key == "teacher.path":  # which has to be there
        advice = "leave the section teacher out"
    source = ModelSource(key, path, config.model.trust_remote_code, advice)
    found = findings.of(lambda: find_model(source, check_decoder_only))
    has_head = key != "critic.path"
    facts = _facts(found or known_model(key, path), config, findings, has_head=has_head)
    if facts is not None and policy is not None:
        findings.of(lambda: _refuse_other_vocabulary(source, facts, policy))
    if found is not None and found.folder is not None and tokenizer is not None:
        findings.of(lambda: _refuse_other_tokens(found, tokenizer))
    return facts


def _refuse_other_vocabulary(source: ModelSource, facts: ModelFacts, policy: ModelFacts) -> None:
    if facts.vocab_size < policy.vocab_size:
        raise ConfigError(
            f"{source}: it knows {facts.vocab_size:,} tokens, and the policy, whose responses it reads, "
            f"{policy.vocab_size:,}; give a model of the same family, or {source.advice}"
        )


def _refuse_other_tokens(found: FoundModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Where it comes with a tokenizer. A few tokens may differ: models of a family add some of their own."""
    from asyncrl.data.tokenizer import TokenizerError, read_tokenizer  # imports transformers

    source = found.source
    try:
        other = read_tokenizer(str(found.folder), trust_remote_code=source.trust_remote_code).get_vocab()
    except TokenizerError:
        return
    own = tokenizer.get_vocab()
    differing = sum(other.get(text) != token_id for text, token_id in own.items())
    if differing > _DIFFERING_SHARE * len(own):
        raise ConfigError(
            f"{source}: its tokenizer is another: {differing:,} of the policy's {len(own):,} tokens have "
            f"other ids there, or none; give a model of the same family, or {source.advice}"
        )


def _reward_model(i: int, config: Config, findings: Findings) -> RewardModelFacts | None:
    model = findings.of(lambda: find_reward_model(i, config.reward.models[i]))
    if model is None:
        known = known_model(f"reward.models.{i}.path", config.reward.models[i].path)
        return None if known is None else reward_model_facts(known, None)
    findings.of(lambda: check_weights(model))
    tokenizer = findings.of(lambda: load_template(model))
    return findings.of(lambda: reward_model_facts(model, tokenizer))
