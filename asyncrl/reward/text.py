"""What rewards read of a response."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence

from transformers import PreTrainedTokenizerBase

from asyncrl.config import Config
from asyncrl.data.stops import stop_token_ids
from asyncrl.data.tokenizer import load_tokenizer
from asyncrl.reward.thinking import Thinking, thinking_of

PROMPTS_END = 64
"""Tokens at the end of a prompt in which it may begin the thinking."""


class ResponseText:
    """The text of a response as rewards read it.

    Tokens that end a response or pad are no part of it. Other special tokens are: a model may mark its
    thinking or a tool call by them, and rewards look for that.

    ends: tokens that end a response. strip_special: leave out every special token. thinking: what `answer`
    leaves out, if it is wanted.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        ends: Collection[int],
        *,
        strip_special: bool = False,
        thinking: Thinking | None = None,
    ) -> None:
        self._tokenizer = tokenizer
        self._left_out = {*ends, tokenizer.eos_token_id, tokenizer.pad_token_id}
        special = (t.content for t in tokenizer.added_tokens_decoder.values() if t.special)
        self._special = re.compile("|".join(map(re.escape, special)) or "(?!)") if strip_special else None
        self._thinking = thinking

    def __call__(self, token_ids: Sequence[int]) -> str:
        return self._stripped(self._text(token_ids, skip_special=self._special is not None))

    def answer(self, prompt_ids: Sequence[int], token_ids: Sequence[int]) -> str | None:
        """What follows the thinking; None if nobody wants it. prompt_ids: what stands before the response."""
        if self._thinking is None:
            return None
        prompt = self._tokenizer.decode(prompt_ids[-PROMPTS_END:])
        # The marks may be special tokens, so these are left out after they have been looked for.
        is_begun = self._thinking.is_begun_by(prompt)
        return self._stripped(self._thinking.answer(self._text(token_ids), is_begun=is_begun))

    def _stripped(self, text: str) -> str:
        """Without special tokens, if they are to be left out, also those that the policy spelled: whoever
        tokenises the text again would take them for such. A space breaks what leaving out one has formed."""
        return text if self._special is None else self._special.sub(" ", self._special.sub("", text))

    def _text(self, token_ids: Sequence[int], *, skip_special: bool = False) -> str:
        kept = [token_id for token_id in token_ids if token_id not in self._left_out]
        text = self._tokenizer.decode(kept, skip_special_tokens=skip_special)
        assert isinstance(text, str)
        return text


def response_text(config: Config) -> ResponseText:
    """Of the run's model. Raises `ConfigError`, as `thinking_of` does."""
    tokenizer = load_tokenizer(config.model)
    return ResponseText(
        tokenizer,
        {*stop_token_ids(config.model), *config.rollout.stop_token_ids},
        strip_special=config.reward.strip_special_tokens,
        thinking=thinking_of(config.reward, tokenizer),
    )
