"""A verifiable reward: is the answer of a mathematical problem right? Needs `pip install asyncrl[math]`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib.util import find_spec
from typing import Any

from asyncrl.errors import NotHereError

if find_spec("math_verify") is None:  # found out before a run starts, not by its first answer
    raise NotHereError("asyncrl.reward.math: needs the package math-verify: pip install 'asyncrl[math]'")


def math_answer(
    completions: Sequence[Any], ground_truth: Sequence[str] | None = None, reward_model: Sequence[Any] = ()
) -> list[float]:
    """1.0 where a response's last answer equals the row's, mathematically (1/2 is 0.5 is \\frac{1}{2}), else
    0.0.

    The right answer comes from the column `ground_truth`, or from `reward_model.ground_truth` as in verl's
    datasets. Raises `ValueError` for a row without one.
    """
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

    # Of several boxes the last is the answer; by default all of them together are.
    latex = LatexExtractionConfig(boxed_match_priority=0)
    latex = replace(latex, normalization_config=replace(latex.normalization_config, boxed="last"))
    extraction = (latex, ExprExtractionConfig())
    answers = ground_truth or [_ground_truth(row) for row in reward_model]
    scores = []
    for completion, answer in zip(completions, answers, strict=True):
        # Their own time-outs need the main thread's alarm; a call here is bounded by `reward.timeout_s`.
        wanted = parse(answer if "$" in answer or "\\" in answer else f"${answer}$", parsing_timeout=None)
        given = parse(_text(completion), extraction, parsing_timeout=None)
        scores.append(float(verify(wanted, given, timeout_seconds=None)))
    return scores


def _ground_truth(row: Any) -> str:
    answer = row.get("ground_truth") if isinstance(row, Mapping) else None
    if not answer:
        raise ValueError(
            f"there is no answer to check against: no column `ground_truth`, and reward_model is {row!r}"
        )
    return str(answer)


def _text(completion: Any) -> str:
    return completion if isinstance(completion, str) else completion[-1]["content"]
