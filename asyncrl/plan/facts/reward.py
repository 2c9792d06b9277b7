"""What can be known of a reward model without its weights; refuses what gives no scores."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from asyncrl.config import Config, RewardModelConfig
from asyncrl.data.prompts import Prompt, PromptSet
from asyncrl.decoders.facts import LayerShape
from asyncrl.errors import ConfigError
from asyncrl.plan.facts.model import (
    FoundModel,
    ModelSource,
    find_model,
    find_tokenizer,
    layer_shape,
    measuring,
)
from asyncrl.reward.route import scoring_parts
from asyncrl.reward.template import UnreadablePairError, pair_ids

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

ADVICE = (
    "give a folder with a sequence-classification model of one output, such as `asyncrl train-reward` makes, "
    "or a hub name such as Skywork/Skywork-Reward-V2-Llama-3.1-8B"
)


@dataclass(frozen=True, slots=True)
class RewardModelFacts:
    parameters: int
    vocab_size: int
    layer: LayerShape
    max_positions: int | None
    """Longest pair that the model's positions allow, None where the model sets no limit."""
    tokenizer: PreTrainedTokenizerBase | None
    """None where it is not on this machine."""


def find_reward_model(i: int, model: RewardModelConfig) -> FoundModel:
    """The model that `reward.models.N.path` names. Raises `NotHereError` when it cannot be reached,
    `ConfigError` when it gives no score."""
    source = ModelSource(f"reward.models.{i}.path", model.path, model.trust_remote_code, ADVICE)
    return find_model(source, _check_scores)


def load_template(found: FoundModel) -> PreTrainedTokenizerBase:
    """The model's tokenizer, with the chat template by which it reads a pair. Raises `ConfigError` when there
    is none."""
    tokenizer = find_tokenizer(found)
    if tokenizer.chat_template is None:
        raise ConfigError(
            f"{found.source}: its tokenizer has no chat template, so nothing says how it reads a prompt and "
            "a response; put the chat_template.jinja that it was trained with into the folder"
        )
    return tokenizer


def reward_model_facts(found: FoundModel, tokenizer: PreTrainedTokenizerBase | None) -> RewardModelFacts:
    """A reward model's sizes, from its structure alone. Raises `ConfigError` for a config.json that makes no
    model."""
    with measuring(found.source):
        return _measured(found, tokenizer)


def _measured(found: FoundModel, tokenizer: PreTrainedTokenizerBase | None) -> RewardModelFacts:
    import torch
    from transformers import AutoModelForSequenceClassification

    text = found.config.get_text_config()
    with torch.device("meta"):
        shell = AutoModelForSequenceClassification.from_config(
            found.config, trust_remote_code=found.source.trust_remote_code
        )
    return RewardModelFacts(
        parameters=sum(parameter.numel() for parameter in shell.parameters()),
        vocab_size=text.vocab_size,
        layer=layer_shape(found.config, shell),
        max_positions=getattr(text, "max_position_embeddings", None),
        tokenizer=tokenizer,
    )


def check_pairs(config: Config, models: Sequence[RewardModelFacts | None], prompts: PromptSet) -> None:
    """Each known reward model can read the prompts that it is to score responses to. Raises `ConfigError`.

    Looked at are the longest prompt and one of every succession of roles, since that is what templates
    refuse.
    """
    for i, (model, facts) in enumerate(zip(config.reward.models, models, strict=True)):
        if facts is None or facts.tokenizer is None:
            continue
        rows = [row for row in prompts if model.label in scoring_parts(config.reward, row.columns)]
        key = f"reward.models.{i}.path={model.path}"
        for row in _telling(rows):
            _check_pair(key, facts, facts.tokenizer, row, config.rollout.max_new_tokens)


def _check_scores(source: ModelSource, config: PreTrainedConfig) -> None:
    declared = config.architectures or []
    if not any("SequenceClassification" in name or "RewardModel" in name for name in declared):
        raise ConfigError(
            f"{source}: {', '.join(declared) or config.model_type} gives no score; {source.advice}"
        )
    if config.num_labels != 1:
        raise ConfigError(
            f"{source}: it has {config.num_labels} outputs, but a reward model has one; {source.advice}"
        )


def _telling(rows: list[Prompt]) -> list[Prompt]:
    by_roles = {}
    for row in rows:
        roles = () if isinstance(row.prompt, str) else tuple(message["role"] for message in row.prompt)
        by_roles.setdefault(roles, row)
    return [*by_roles.values(), *sorted(rows, key=lambda row: -len(row.prompt_ids))[:1]]


def _check_pair(
    key: str, facts: RewardModelFacts, tokenizer: PreTrainedTokenizerBase, row: Prompt, max_new_tokens: int
) -> None:
    try:
        ids = pair_ids(tokenizer, row.prompt, "yes")
    except UnreadablePairError as error:
        raise ConfigError(
            f"{key}: {error} (usable row {row.index} of the dataset); use a model whose template takes its "
            "messages, or change them (data.system_prompt)"
        ) from None
    longest = len(ids) + max_new_tokens
    if facts.max_positions is not None and longest > facts.max_positions:
        raise ConfigError(
            f"{key}: usable row {row.index} of the dataset and a response of rollout.max_new_tokens="
            f"{max_new_tokens} make about {longest} tokens, over the model's {facts.max_positions} "
            "positions; use a lower rollout.max_new_tokens or data.max_prompt_tokens"
        )
    if max(ids) >= facts.vocab_size:
        raise ConfigError(
            f"{key}: its tokenizer gives the token id {max(ids)}, but the model knows only "
            f"{facts.vocab_size} tokens; the tokenizer is another model's"
        )
