"""What rewards read of a response."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from transformers import PreTrainedTokenizerBase

from asyncrl.config import Config
from asyncrl.data.stops import stop_token_ids
from asyncrl.data.tokenizer import load_tokenizer


class ResponseText:
    """The text of a response as rewards read it.

    Tokens that end a response or pad are no part of it. Other special tokens are: a model may mark its
    thinking or a tool call by them, and rewards look for that.

    ends: tokens that end a response. strip_special: leave out every special token.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, ends: Collection[int], *, strip_special: bool = False
    ) -> None:
        self._tokenizer = tokenizer
        self._left_out = {*ends, tokenizer.eos_token_id, tokenizer.pad_token_id}
        self._strip_special = strip_special

    def __call__(self, token_ids: Sequence[int]) -> str:
        kept = [token_id for token_id in token_ids if token_id not in self._left_out]
        text = self._tokenizer.decode(kept, skip_special_tokens=self._strip_special)
        assert isinstance(text, str)
        return text


def response_text(config: Config) -> ResponseText:
    """Of the run's model."""
    return ResponseText(
        load_tokenizer(config.model),
        {*stop_token_ids(config.model), *config.rollout.stop_token_ids},
        strip_special=config.reward.strip_special_tokens,
    )
