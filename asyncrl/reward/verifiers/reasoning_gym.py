"""A verifiable reward: what a task of reasoning-gym makes of an answer. Needs
`pip install asyncrl[reasoning-gym]`."""

from __future__ import annotations

import ast
import importlib
import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from asyncrl.data.reasoning_gym import task_of
from asyncrl.packages import need
from asyncrl.reward.processes.deadline import left_s
from asyncrl.reward.processes.limited import BUDGET_S, BUDGET_SHARE, Limited, decided
from asyncrl.reward.score import completion_text

# Before a run starts, not at its first answer.
need("reasoning_gym", "asyncrl.reward.verifiers.reasoning_gym")

_EVALUATING = ("eval(", "exec(", "parse_expr(", "sympify(")
"""By what a task runs an answer as Python: SymPy's parsers do, too."""


def reasoning_gym(completions: Sequence[Any], reasoning_gym: Sequence[Mapping[str, str]]) -> list[float]:
    """The score of the row's task (`data.path: reasoning-gym:TASK`) for what a response has between its last
    `<answer>` and `</answer>`, or for the whole of it where it has none: 1.0 is right. 0.0 for what the task
    cannot read. Raises `ValueError` where it cannot read its own answer either.

    Tasks that run an answer as Python, such as `countdown`, do so in the sandbox, and what takes more than a
    second of computing is wrong. Raises `SandboxError` where there is no sandbox.
    """
    calls = [
        (row["task"], row["options"], row["entry"], _answer(completion_text(completion)))
        for completion, row in zip(completions, reasoning_gym, strict=True)
    ]
    row = reasoning_gym[0]
    if _evaluates(row["task"], row["options"]):
        return decided(calls, PROCESS, BUDGET_SHARE * left_s(otherwise=BUDGET_S))
    return [_score(*call) for call in calls]


def _answer(text: str) -> str:
    from reasoning_gym.utils import extract_answer

    marked: str | None = extract_answer(text)
    return text.strip() if marked is None else marked


def _evaluates(task: str, options: str) -> bool:
    source = inspect.getsource(type(task_of(task, options)))
    return any(call in source for call in _EVALUATING)


def _score(task: str, options: str, entry: str, answer: str) -> float:
    try:
        asked, of_row = task_of(task, options), ast.literal_eval(entry)
        try:
            return float(asked.score_answer(answer, of_row))
        except Exception:  # noqa: BLE001 - some tasks let the errors of their parsers through
            asked.score_answer(of_row["answer"], of_row)
            return 0.0
    except Exception as error:
        raise ValueError(f"`{task}` cannot score its own answer: {type(error).__name__}: {error}") from error


PROCESS = Limited(_score, lambda: importlib.import_module("reasoning_gym"), is_confined=True)
"""Lives as long as this process, and is never used by two calls at once."""
