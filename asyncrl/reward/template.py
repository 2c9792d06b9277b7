"""A prompt and its response as the tokens that a reward model reads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from asyncrl.reward.score import Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class UnreadablePairError(ValueError):
    """A reward model cannot be given a pair. The message says why."""


def conversation(prompt: str | Sequence[Message], response: str) -> list[Message]:
    """The pair as a conversation; a prompt that is a string is what the user said."""
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
    return [*messages, {"role": "assistant", "content": response}]


def pair_ids(tokenizer: PreTrainedTokenizerBase, prompt: str | Sequence[Message], response: str) -> list[int]:
    """The pair in the reward model's own tokens, through its own chat template.

    The template writes every special token, a beginning of sequence too, and nothing is added to them. It
    also ends the assistant's turn, for a response that was cut off at its longest as for any other: reward
    models have been trained on ended turns only, and what they make of anything else means nothing (and could
    be earned by never ending). That a response was cut off is for `reward.overlong` to punish.

    Raises `UnreadablePairError` where the template refuses the conversation.
    """
    from jinja2 import TemplateError

    try:
        text = tokenizer.apply_chat_template(conversation(prompt, response), tokenize=False)
    except (TemplateError, TypeError, ValueError) as error:
        raise UnreadablePairError(f"its chat template refuses the conversation: {error}") from None
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return ids
