"""Parts of a reward that judge the form of a response."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from asyncrl.reward.score import completion_text


def soft_overlong(tokens: int, max_tokens: int, buffer_tokens: int) -> float:
    """Soft overlong punishment of DAPO (Yu et al. 2025, arXiv 2503.14476, equation 13) for a response of
    `tokens` tokens, end of sequence included: 0 up to `max_tokens - buffer_tokens`, from there linearly down
    to -1 at `max_tokens`, and -1 beyond."""
    room = max_tokens - buffer_tokens - tokens
    return max(min(room / buffer_tokens, 0.0), -1.0)


def format_function(pattern: str) -> Callable[..., list[float]]:
    """A reward function: 0 for a response that matches `pattern` as a whole (`.` also matches line ends),
    else -1.

    It runs in a reward process, as all functions do, because some patterns take for ever on some texts.
    """
    compiled = re.compile(pattern, re.DOTALL)

    def format_penalty(completions: list[Any]) -> list[float]:
        return [0.0 if compiled.fullmatch(completion_text(c)) else -1.0 for c in completions]

    return format_penalty
