"""What is scored, and what comes of it: requests, scores, and what is taken for a score."""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from asyncrl.errors import AsyncRLError

Message = dict[str, Any]


class RewardError(AsyncRLError):
    """A group could not be scored: no reward is made up for it."""

    def __init__(self, part: str, reason: str, attempts: int, kind: str = "function") -> None:
        """part: its name in the metrics. kind: `function` or `model`."""
        tries = "1 attempt" if attempts == 1 else f"{attempts} attempts"
        super().__init__(f"reward {kind} `{part}` failed after {tries}: {reason}")
        self.part = part
        self.kind = kind
        self.reason = reason
        self.attempts = attempts


@dataclass(frozen=True, slots=True)
class ScoreRequest:
    """One prompt with all its completions, to be scored together."""

    prompt: str | list[Message]
    completions: Sequence[str]
    completion_ids: Sequence[Sequence[int]]
    """The completions' token ids, stop tokens included."""
    columns: Mapping[str, Any]
    """The prompt row's other columns; their values must be representable in MessagePack."""
    version: int
    """The policy version, shown to functions as `trainer_state.global_step`."""


@dataclass(frozen=True, slots=True)
class Score:
    """The score of one completion."""

    reward: float
    """What the `parts` compose to (`asyncrl.reward.compose`); finite."""
    parts: dict[str, float]
    """As they were scored, by name; parts that do not apply are left out."""
    extra: dict[str, Any]
    """What functions kept with `log_extra`, by column."""


@dataclass(frozen=True, slots=True)
class Part:
    """What one function made of a group of N completions."""

    name: str
    values: Sequence[float | None]
    """N finite numbers, or None where the function does not apply."""
    extra: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    """Column -> N values."""


def checked_values(returned: Any, n: int) -> list[float | None]:
    """What a reward function returned for `n` completions, as finite floats and None.

    Takes lists, tuples, arrays and tensors. Raises `ValueError` that says what is wrong with which result.
    """
    values = returned.tolist() if hasattr(returned, "tolist") else returned
    if not isinstance(values, list | tuple):
        raise ValueError(
            f"it returned {_shown(returned)}; it should return a list with one number or None a completion"
        )
    if len(values) != n:
        raise ValueError(f"it returned {len(values)} results for {n} completions; one each is needed")
    return [_checked_value(value, i) for i, value in enumerate(values)]


def _checked_value(value: Any, i: int) -> float | None:
    if value is None:
        return None
    number = value.item() if hasattr(value, "item") else value
    if not isinstance(number, numbers.Real):
        raise ValueError(f"result {i} is {_shown(value)}; it should be a number or None")
    try:
        result = float(number)
    except OverflowError:
        result = math.inf
    if not math.isfinite(result):
        raise ValueError(
            f"result {i} is {result}: a reward must be finite; return None where the function does not apply"
        )
    return result


def _shown(value: Any) -> str:
    text = repr(value)
    return f"{text if len(text) <= 80 else text[:77] + '...'} ({type(value).__name__})"
