"""Tokenises prompts in batches: conversations through the chat template, strings as they are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self, TypeAlias

import numpy as np
from numpy.typing import NDArray

from asyncrl.data.messages import UnusablePromptError
from asyncrl.data.prompts import Message
from asyncrl.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Tokenised: TypeAlias = NDArray[np.int32] | UnusablePromptError
_CHARACTERS = 8
"""More than most tokens have."""


@dataclass(frozen=True, slots=True)
class AddedTokens:
    """Special tokens that a tokenizer adds to a text."""

    before: tuple[int, ...]
    """For example a beginning of sequence."""
    after: tuple[int, ...]
    """For example an end of sequence."""

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> Self:
        plain = tokenizer("a", add_special_tokens=False)["input_ids"]
        whole = tokenizer("a")["input_ids"]
        starts = [i for i in range(len(whole)) if whole[i : i + len(plain)] == plain]
        if not starts:  # it encodes the start of a text differently: the added tokens cannot be told apart
            return cls((), ())
        return cls(tuple(whole[: starts[0]]), tuple(whole[starts[0] + len(plain) :]))


def tokenise(
    prompts: Sequence[str | list[Message]],
    tokenizer: PreTrainedTokenizerBase,
    max_tokens: int,
    template_arguments: Sequence[Mapping[str, Any]],
) -> list[Tokenised]:
    """For each prompt its token ids, int32[P] with 1 <= P <= `max_tokens`, or the reason why it is unusable.

    A conversation is rendered with the generation prompt and its `template_arguments`; the template writes
    every special token. A string gets the special tokens that the tokenizer puts before a text, unless it
    starts with them (because it was rendered before), and none after it, since the model is to continue it.
    Raises `ConfigError` for conversations if the tokenizer has no chat template.
    """
    results: list[Tokenised | None] = [None] * len(prompts)
    texts: dict[int, str] = {}
    for i, prompt in enumerate(prompts):
        try:
            is_text = isinstance(prompt, str)
            texts[i] = prompt if is_text else _render(prompt, tokenizer, template_arguments[i])
        except UnusablePromptError as error:
            results[i] = error
    if texts:
        before = list(AddedTokens.of(tokenizer).before)
        encoded = tokenizer(list(texts.values()), add_special_tokens=False, verbose=False)["input_ids"]
        for i, ids in zip(texts, encoded, strict=True):
            adds = before if isinstance(prompts[i], str) and ids[: len(before)] != before else []
            results[i] = _within(adds + ids, max_tokens)
    return [result for result in results if result is not None]


def cut_beyond(text: str, tokens: int, tokenizer: PreTrainedTokenizerBase) -> str:
    """The text, or where it is far longer than so many tokens, a beginning that is longer, too: to tokenise
    megabytes takes seconds, in which a worker's event loop does nothing else."""
    begin = text[: _CHARACTERS * tokens]
    if len(begin) == len(text):
        return text
    ids = tokenizer(begin, add_special_tokens=False, verbose=False)["input_ids"]
    return begin if len(ids) > tokens else text


def _within(ids: list[int], max_tokens: int) -> Tokenised:
    if not ids:
        return UnusablePromptError("has no tokens")
    if len(ids) > max_tokens:
        return UnusablePromptError(f"has {len(ids):,} tokens; data.max_prompt_tokens is {max_tokens:,}")
    return np.asarray(ids, dtype=np.int32)


def _render(messages: list[Message], tokenizer: PreTrainedTokenizerBase, arguments: Mapping[str, Any]) -> str:
    from jinja2 import TemplateError

    try:
        tokenizer.get_chat_template()
    except (ValueError, NotImplementedError):
        raise ConfigError(
            f"the dataset has conversations, but the tokenizer of {tokenizer.name_or_path} has no chat "
            "template: use an instruction-tuned model, put a chat_template.jinja into the model's folder, or "
            "give the prompts as strings (and no data.system_prompt)"
        ) from None
    try:
        text = tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True, **arguments
        )
    except (TemplateError, TypeError, ValueError) as error:
        raise UnusablePromptError(f"is rejected by the model's chat template: {error}") from None
    return str(text)
