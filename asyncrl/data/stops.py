"""Where a model's turn ends: the tokens that end a response."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from transformers import AutoConfig, GenerationConfig

from asyncrl.data.tokenizer import TokenizerError, load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from asyncrl.config import ModelConfig

_ANSWER = "asyncrl-answer"


def stop_tokens(model: ModelConfig) -> dict[int, list[str]]:
    """Every token that ends a response, with all that name it: generation settings, configuration, tokenizer
    and chat template.

    They need not agree. A base model's generation settings often name its end of text, and its chat template
    ends a turn with another token: stopping at the one alone, every response would run to its limit.
    """
    found: dict[int, list[str]] = {}

    def name(token_ids: Iterable[int | None], source: str) -> None:
        for token_id in token_ids:
            if token_id is not None:
                found.setdefault(token_id, []).append(source)

    name(_generation_settings(model), "generation_config.json")
    config = AutoConfig.from_pretrained(model.path, trust_remote_code=model.trust_remote_code)
    name(_several(getattr(config.get_text_config(), "eos_token_id", None)), "config.json")
    tokenizer = _tokenizer(model)
    if tokenizer is not None:
        name([tokenizer.eos_token_id], "tokenizer")
        name([end_of_turn(tokenizer)], "chat template")
    return found


def stop_token_ids(model: ModelConfig) -> tuple[int, ...]:
    """The ids of `stop_tokens`, in ascending order."""
    return tuple(sorted(stop_tokens(model)))


def end_of_turn(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The token that the chat template writes after an assistant's message; None where there is no template,
    or where it ends a turn with plain text."""
    conversation = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": _ANSWER}]
    try:
        text = tokenizer.apply_chat_template(conversation, tokenize=False)
    except Exception:  # noqa: BLE001 - no template, or one that wants something else: each says so in its way
        return None
    _, answer, after = str(text).rpartition(_ANSWER)
    if not answer or not after.strip():
        return None
    first = tokenizer(after.lstrip(), add_special_tokens=False)["input_ids"][0]
    return first if first in tokenizer.added_tokens_decoder else None


def _generation_settings(model: ModelConfig) -> list[int]:
    try:
        return _several(GenerationConfig.from_pretrained(model.path).eos_token_id)
    except OSError:  # the model comes without
        return []


def _tokenizer(model: ModelConfig) -> PreTrainedTokenizerBase | None:
    try:
        return load_tokenizer(model)
    except TokenizerError:  # preflight refuses it where one is needed
        return None


def _several(token_ids: int | list[int] | None) -> list[int]:
    if token_ids is None:
        return []
    return [token_ids] if isinstance(token_ids, int) else list(token_ids)
