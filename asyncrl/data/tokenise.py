"""Prompts to tokens, in batches: conversations through the chat template, strings as they are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
from numpy.typing import NDArray

from asyncrl.data.messages import UnusablePromptError
from asyncrl.data.prompts import Message
from asyncrl.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Tokenised: TypeAlias = NDArray[np.int32] | UnusablePromptError


def tokenise(
    prompts: Sequence[str | list[Message]], tokenizer: PreTrainedTokenizerBase, max_tokens: int
) -> list[Tokenised]:
    """For each prompt its int32[P] token ids, 1 <= P <= `max_tokens`, or why it has none.

    A conversation is rendered with the generation prompt, and the template writes every special token. A
    string gets the special tokens that the tokenizer itself adds (such as a beginning of sequence). Raises
    `ConfigError` for conversations when the tokenizer has no chat template.
    """
    results: list[Tokenised | None] = [None] * len(prompts)
    texts: dict[bool, dict[int, str]] = {
        False: {},
        True: {},
    }  # by whether it was a conversation, then by index
    for i, prompt in enumerate(prompts):
        try:
            text = prompt if isinstance(prompt, str) else _render(prompt, tokenizer)
            texts[not isinstance(prompt, str)][i] = text
        except UnusablePromptError as error:
            results[i] = error
    for is_conversation, chosen in texts.items():
        if chosen:
            encoded = tokenizer(list(chosen.values()), add_special_tokens=not is_conversation, verbose=False)
            for i, ids in zip(chosen, encoded["input_ids"], strict=True):
                results[i] = _within(ids, max_tokens)
    return [result for result in results if result is not None]


def _within(ids: list[int], max_tokens: int) -> Tokenised:
    if not ids:
        return UnusablePromptError("becomes no token at all")
    if len(ids) > max_tokens:
        return UnusablePromptError(f"has {len(ids):,} tokens; data.max_prompt_tokens is {max_tokens:,}")
    return np.asarray(ids, dtype=np.int32)


def _render(messages: list[Message], tokenizer: PreTrainedTokenizerBase) -> str:
    from jinja2 import TemplateError

    try:
        tokenizer.get_chat_template()
    except ValueError:
        raise ConfigError(
            f"the dataset has conversations, but the tokenizer of {tokenizer.name_or_path} has no chat "
            "template: use an instruction-tuned model, put a chat_template.jinja into the model's folder, or "
            "give the prompts as strings (and no data.system_prompt)"
        ) from None
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except (TemplateError, TypeError, ValueError) as error:
        raise UnusablePromptError(f"is refused by the model's chat template: {error}") from None
    return str(text)
