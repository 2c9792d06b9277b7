"""A verifiable reward: whether a mathematical answer is correct. Needs `pip install asyncrl[math]`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from asyncrl.packages import need
from asyncrl.reward.processes.deadline import left_s
from asyncrl.reward.processes.math_process import MathProcess, decided
from asyncrl.reward.score import completion_text

need("math_verify", "asyncrl.reward.math")  # before a run starts, not at its first answer

PROCESS = MathProcess()
"""Lives as long as this process, and is never used by two calls at once."""
BUDGET_S, BUDGET_SHARE = 30.0, 0.5
"""Time for a group without a time limit, and the share of the limit that slow comparisons may use."""


def math_answer(
    completions: Sequence[Any], ground_truth: Sequence[Any] | None = None, reward_model: Sequence[Any] = ()
) -> list[float]:
    """1.0 if a response's last answer equals the row's mathematically (1/2 is 0.5 is \\frac{1}{2}), else 0.0;
    also 0.0 if the comparison takes more than a second of computing, or those of the group together more than
    half of `reward.timeout_s`.

    The correct answer, a number or LaTeX with or without dollar signs, comes from the column `ground_truth`,
    or from `reward_model.ground_truth` as in verl's datasets. Raises `ValueError` for a row without one, or
    with one that cannot be parsed.
    """
    rows = reward_model or [None] * len(completions)
    answers = [
        row.get("ground_truth") if answer is None and isinstance(row, Mapping) else answer
        for answer, row in zip(ground_truth or [None] * len(rows), rows, strict=True)
    ]
    pairs = [
        (_checked(answer), completion_text(text)) for text, answer in zip(completions, answers, strict=True)
    ]
    budget_s = BUDGET_SHARE * left_s(otherwise=BUDGET_S)
    return [float(is_right) for is_right in decided(pairs, PROCESS.equal, budget_s)]


def _checked(answer: Any) -> str:
    if answer is None or not str(answer).strip():
        raise ValueError(
            "there is no correct answer to compare with: neither the column `ground_truth` nor "
            f"`reward_model.ground_truth` has one (found {answer!r})"
        )
    return str(answer)
