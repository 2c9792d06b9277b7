"""What a judge is asked about a group, and what its replies are worth: pure functions.

A question shows some responses, in an order; a reply gives a value to each of them. The value of a response
is the mean over all questions that show it, each asked `votes` times. With both orders of every pair, and
with an order of its own for every vote on a group, a liking for a place cancels.

    score      marks of each response alone
    criteria   the share of the rubric that it meets, by weight: Rubrics as Rewards, Gunjal et al. 2025, arXiv
               2507.17746, explicit aggregation; points of HealthBench, Arora et al. 2025, arXiv 2505.08775
    pairs      the share of comparisons that it wins
    group      marks of all side by side, averaged over votes: SPCT, Liu et al. 2025, arXiv 2504.02495
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import msgspec

from asyncrl.config import RewardJudgeConfig

Question = tuple[int, ...]
"""Indices of the responses that it shows, in order; N is the reference, where there are N responses."""


@dataclass(frozen=True, slots=True)
class Criterion:
    criterion: str
    weight: float = 1.0


class Score(msgspec.Struct):
    score: float


class Criteria(msgspec.Struct):
    met: list[bool]


class Winner(msgspec.Struct):
    winner: Literal["A", "B", "tie"]


class Scores(msgspec.Struct):
    scores: list[float]


Reply = Score | Criteria | Winner | Scores
REPLIES: dict[str, type[Reply]] = {"score": Score, "criteria": Criteria, "pairs": Winner, "group": Scores}
"""The JSON object that a judge replies with, by what it is asked."""
_WINS = {"A": [1.0, 0.0], "B": [0.0, 1.0], "tie": [0.5, 0.5]}


def questions(judge: RewardJudgeConfig, n: int) -> list[list[Question]]:
    """For each vote, the questions about a group of `n` responses."""
    if judge.asks == "group":
        step = max(1, n // judge.votes) if judge.swap else 0
        order = tuple(range(n))
        return [[order[v * step % n :] + order[: v * step % n]] for v in range(judge.votes)]
    once: list[Question] = [(i,) for i in range(n)]
    if judge.asks == "pairs":
        once = _pairs(judge, n)
        once += [pair[::-1] for pair in once] * judge.swap
    return [once] * judge.votes


def _pairs(judge: RewardJudgeConfig, n: int) -> list[Question]:
    if judge.reference_column is not None:
        return [(i, n) for i in range(n)]
    if judge.opponents is None:
        return list(itertools.combinations(range(n), 2))
    steps = range(1, 1 + min(judge.opponents, n - 1))
    circle = ((i, (i + step) % n) for step in steps for i in range(n))
    return list({frozenset(pair): pair for pair in circle}.values())


def values_of(reply: Reply, judge: RewardJudgeConfig, shown: int, rubric: Sequence[Criterion]) -> list[float]:
    """The value of each of the `shown` responses. Raises `ValueError` for a reply that is none to the
    question."""
    match reply:
        case Winner():
            return _WINS[reply.winner]
        case Criteria():
            if len(reply.met) != len(rubric):
                raise ValueError(f"it decides on {len(reply.met)} criteria, and there are {len(rubric)}")
            gained = sum(c.weight for c, is_met in zip(rubric, reply.met, strict=True) if is_met)
            return [gained / sum(c.weight for c in rubric if c.weight > 0)]
        case Score():
            marks = [reply.score]
        case Scores():
            marks = reply.scores
    if len(marks) != shown:
        raise ValueError(f"it has {len(marks)} marks for {shown} responses")
    worst, best = judge.scale
    for mark in marks:
        if not worst <= mark <= best:
            raise ValueError(f"its mark {mark:g} is not from {worst:g} to {best:g}")
    return [(mark - worst) / (best - worst) for mark in marks]


def means(n: int, replies: Sequence[tuple[Question, Sequence[float]]]) -> list[float]:
    """The value of each of `n` responses, from the values that each question gave; a tie for one that has no
    other to be compared with (episodes may say themselves what the others have earned)."""
    found: list[list[float]] = [[] for _ in range(n)]
    for question, values in replies:
        for i, value in zip(question, values, strict=True):
            if i < n:
                found[i].append(value)
    return [sum(values) / len(values) if values else 0.5 for values in found]


def rubric_of(judge: RewardJudgeConfig, row: Mapping[str, Any]) -> list[Criterion]:
    """The criteria for a row. Raises `ValueError` for a column that holds something else."""
    if judge.rubric_column is None:
        return [Criterion(c.criterion, c.weight) for c in judge.rubric]
    listed = row.get(judge.rubric_column)
    called = f"the rubric in the column `{judge.rubric_column}`"
    if not isinstance(listed, list) or not listed:
        raise ValueError(f"{called} is {listed!r:.100}; it should be a list of criteria")
    rubric = [_criterion(item, called) for item in listed]
    if not any(c.weight > 0 for c in rubric):
        raise ValueError(f"{called} has no criterion with a positive weight, so there is nothing to gain")
    return rubric


def _criterion(item: Any, called: str) -> Criterion:
    if isinstance(item, str):
        return Criterion(item)
    if isinstance(item, Mapping):
        text, weight = (
            item.get("criterion", item.get("description")),
            item.get("weight", item.get("points", 1.0)),
        )
        if isinstance(text, str) and isinstance(weight, int | float):
            return Criterion(text, float(weight))
    raise ValueError(f"{called} has {item!r:.100}; write a text, or {{criterion: TEXT, weight: NUMBER}}")
