"""A verifiable reward: whether a mathematical answer is correct. Needs `pip install asyncrl[math]`."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from asyncrl.packages import need
from asyncrl.reward.processes.deadline import left_s
from asyncrl.reward.processes.limited import BUDGET_S, BUDGET_SHARE, Limited, decided
from asyncrl.reward.score import completion_text

need("math_verify", "asyncrl.reward.math")  # before a run starts, not at its first answer


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
    return decided(pairs, PROCESS, budget_s)


def _checked(answer: Any) -> str:
    if answer is None or not str(answer).strip():
        raise ValueError(
            "there is no correct answer to compare with: neither the column `ground_truth` nor "
            f"`reward_model.ground_truth` has one (found {answer!r})"
        )
    return str(answer)


def _equal(answer: str, response: str) -> bool:
    """Whether the last answer in `response` equals `answer`. Raises `ValueError` for an `answer` that cannot
    be parsed."""
    import logging

    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

    logging.getLogger("math_verify").setLevel(
        logging.ERROR
    )  # it warns that nothing limits the time, but we do
    # The last of several boxes is the answer; by default all of them together are.
    latex = LatexExtractionConfig(boxed_match_priority=0)
    latex = replace(latex, normalization_config=replace(latex.normalization_config, boxed="last"))
    extraction = (latex, ExprExtractionConfig())
    is_marked = answer.count("$") >= 2 or "\\boxed" in answer
    plain = "$" + re.sub(r"(?<!\\)\$", "", answer) + "$"
    wanted = parse(answer, extraction, parsing_timeout=None) if is_marked else []
    wanted = wanted or parse(plain, extraction, parsing_timeout=None)  # such as `a+$ $b`
    if not wanted:
        raise ValueError(f"the correct answer {answer!r} cannot be parsed as mathematics")
    given = parse(response, extraction, parsing_timeout=None)
    return bool(verify(wanted, given, timeout_seconds=None))


PROCESS = Limited(_equal, lambda: _equal("1", "1"))
"""Lives as long as this process, and is never used by two calls at once."""
