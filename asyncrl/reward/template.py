"""A prompt and its response as the tokens that a reward model reads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from asyncrl.reward.score import Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class UnreadablePairError(ValueError):
    """A reward model cannot read a pair. The message says why."""


def conversation(prompt: str | Sequence[Message], response: str) -> list[Message]:
    """The pair as a conversation; a string prompt becomes the user's message."""
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
    return [*messages, {"role": "assistant", "content": response}]


def pair_ids(tokenizer: PreTrainedTokenizerBase, prompt: str | Sequence[Message], response: str) -> list[int]:
    """The pair in the reward model's own tokens, through its own chat template.

    The template writes every special token, including a beginning of sequence, and nothing is added to them.
    It also ends the assistant's turn, even if the response was cut off: reward models were trained on
    complete turns only, so their score of anything else means nothing (and could be exploited by never
    ending). `reward.overlong` punishes responses that were cut off.

    Raises `UnreadablePairError` if the template rejects the conversation.
    """
    from jinja2 import TemplateError

    try:
        text = tokenizer.apply_chat_template(conversation(prompt, response), tokenize=False)
    except (TemplateError, TypeError, ValueError) as error:
        raise UnreadablePairError(f"its chat template rejects the conversation: {error}") from None
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return ids
