"""Requests for scores, scores, and the check of what reward functions return."""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from asyncrl.data.values import Message
from asyncrl.errors import AsyncRLError


class RewardError(AsyncRLError):
    """A group could not be scored. It gets no made-up reward."""

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
    """The other columns of the prompt's row; MessagePack must be able to represent their values."""
    version: int
    """The policy version, shown to functions as `trainer_state.global_step`."""
    answers: Sequence[str | None] = ()
    """What follows the thinking in each completion; None where nothing reads it."""
    sampled_tokens: Sequence[int] | None = None
    """That the policy sampled in each response; None: all of `completion_ids`."""

    @property
    def lengths(self) -> Sequence[int]:
        """Sampled tokens of each response."""
        return self.sampled_tokens or [len(ids) for ids in self.completion_ids]

    def seen(self, sees: Literal["all", "answer"]) -> list[str]:
        """The completions as a part reads them that `sees` so."""
        if sees == "all":
            return list(self.completions)
        answers = [answer for answer in self.answers if answer is not None]
        assert len(answers) == len(self.completions)
        return answers


@dataclass(frozen=True, slots=True)
class ResponseReward:
    """The score of one completion."""

    reward: float
    """Composed of the `parts` (`asyncrl.reward.compose`); finite."""
    parts: dict[str, float]
    """The raw scores, by name; parts that do not apply are left out."""
    extra: dict[str, Any]
    """Values that functions stored with `log_extra`, by column."""


@dataclass(frozen=True, slots=True)
class PartValues:
    """The result of one function for a group of N completions."""

    name: str
    values: Sequence[float | None]
    """N values: finite numbers, or None where the function does not apply."""
    extra: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    """Column -> N values."""


def completion_text(completion: Any) -> str:
    """The text of a completion as reward functions get it: a string, or a list with the assistant's
    message."""
    return completion if isinstance(completion, str) else completion[-1]["content"]


def checked_values(returned: Any, n: int) -> list[float | None]:
    """The values that a reward function returned for `n` completions, as finite floats and None.

    Accepts lists, tuples, arrays and tensors. Raises `ValueError` that says which result is wrong, and how.
    """
    values = returned.tolist() if hasattr(returned, "tolist") else returned
    if not isinstance(values, list | tuple):
        raise ValueError(
            f"it returned {_shown(returned)}; it should return a list with one number or None per completion"
        )
    if len(values) != n:
        raise ValueError(
            f"it returned {len(values)} results for {n} completions; it needs one per completion"
        )
    return [_checked_value(value, i) for i, value in enumerate(values)]


def _checked_value(value: Any, i: int) -> float | None:
    if value is None:
        return None
    try:
        number = value.item() if hasattr(value, "item") else value
    except (ValueError, TypeError, RuntimeError):  # an array or a tensor of several
        number = value
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
