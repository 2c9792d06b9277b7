"""What a response is beside the one that it is compared with: no reward, but what is told of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from asyncrl.reward.score import completion_text


def longer_by(completions: Sequence[Any], baseline: Sequence[str], **_: Any) -> list[float]:
    """Characters by which each response is longer than the baseline's."""
    pairs = zip(completions, baseline, strict=True)
    return [float(len(completion_text(response)) - len(other)) for response, other in pairs]


def difficulty(completions: Sequence[Any], difficulty: Sequence[float], **_: Any) -> list[float]:
    """Of the instruction, as the row has it."""
    return [float(value) for value in difficulty]
