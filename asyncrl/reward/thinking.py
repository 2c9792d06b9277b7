"""Tells what a model thinks from what it answers."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from asyncrl.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from asyncrl.config import RewardConfig

KNOWN = (
    ("<think>", "</think>"),  # DeepSeek R1, Qwen 3, GLM 4.5, and most others
    ("[THINK]", "[/THINK]"),  # Magistral
    ("<|channel|>analysis<|message|>", "<|channel|>final<|message|>"),  # gpt-oss
    ("<|channel>thought", "<channel|>"),  # Gemma 4
    ("<|START_THINKING|>", "<|END_THINKING|>"),  # Command A Reasoning
    ("<seed:think>", "</seed:think>"),  # Seed-OSS
    ("<mm:think>", "</mm:think>"),  # MiniMax M3
)
"""What families of models begin and end their thinking with."""


@dataclass(frozen=True, slots=True)
class Thinking:
    """begin, end: the texts that mark it."""

    begin: str
    end: str

    def is_begun_by(self, prompt: str) -> bool:
        """Whether a prompt, rendered, makes the response begin with thinking: some templates write its
        beginning themselves."""
        return prompt.rstrip().endswith(self.begin)

    def answer(self, response: str, *, is_begun: bool) -> str:
        """What is not thinking, without white space around it; nothing where the thinking does not end.

        is_begun: whether the response begins within it. So it does, too, where it ends before it begins. Once
        an answer has begun, an end without a beginning is text of the answer: nothing that is written there
        hides what stands before it.
        """
        mark = re.compile(f"{re.escape(self.begin)}|{re.escape(self.end)}")
        first = mark.search(response)
        if is_begun or (first is not None and first[0] == self.end):
            _, ended, rest = response.partition(self.end)
            if not ended:
                return ""
        else:
            rest = response
        kept = []
        while True:
            before, begun, inner = rest.partition(self.begin)
            kept.append(before)
            if not begun:
                return "".join(kept).strip()
            _, ended, rest = inner.partition(self.end)
            if not ended:
                return ""


def thinking_of(config: RewardConfig, tokenizer: PreTrainedTokenizerBase) -> Thinking | None:
    """How the model marks its thinking: by `reward.thinking`, else by the marks of `KNOWN` that its tokenizer
    has as tokens or its chat template writes. None where nothing reads answers alone. Raises `ConfigError`
    for a model that has none of them."""
    if not config.needs_thinking:
        return None
    return marks_of(config, tokenizer, "reward.sees=answer", "use reward.sees=all")


def marks_of(config: RewardConfig, tokenizer: PreTrainedTokenizerBase, setting: str, advice: str) -> Thinking:
    """The same for the `setting` that needs them. advice: what else one can do."""
    if config.thinking is not None:
        return Thinking(*config.thinking)
    templates = tokenizer.chat_template or ""
    texts = templates.values() if isinstance(templates, dict) else [templates]
    tokens = tokenizer.get_added_vocab()
    for begin, end in KNOWN:
        if end in tokens or any(end in text for text in texts):
            return Thinking(begin, end)
    raise ConfigError(
        f"{setting}: neither the model's tokenizer nor its chat template has known marks of thinking "
        f"({', '.join(end for _, end in KNOWN)}); give them, such as reward.thinking=[<think>, </think>], or "
        + advice
    )
