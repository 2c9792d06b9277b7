"""Finding reward functions by name, and calling them with what they accept."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from asyncrl.resolve import quoted
from asyncrl.resolve import resolve as resolve_function

RewardFunction = Callable[..., Any]

GIVEN = ("prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric")
"""Keyword arguments that every reward function can ask for, besides the dataset's columns."""


def resolve(spec: str, base: Path | None = None) -> RewardFunction:
    """The reward function named by `package.module:function` or `path/file.py:function`
    (`asyncrl.resolve.resolve`)."""
    return resolve_function(spec, base, "reward function")


def accepted(function: RewardFunction, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the keyword `arguments` that `function` takes. Raises `TypeError` naming any that it lacks."""
    missing = missing_columns(function, arguments)
    if missing:
        raise TypeError(
            f"it needs {quoted(missing)}, for which the dataset has no column; there are "
            f"{quoted(sorted(arguments))}"
        )
    parameters = _parameters(function)
    if parameters is None:
        return dict(arguments)
    return {name: value for name, value in arguments.items() if name in parameters}


def missing_columns(function: RewardFunction, columns: Iterable[str]) -> list[str]:
    """The arguments that `function` cannot do without and that neither `columns` nor AsyncRL gives."""
    there = set(columns)
    return [name for name in needed_columns(function) if name not in there]


def needed_columns(function: RewardFunction) -> list[str]:
    """The arguments that `function` cannot do without and that AsyncRL does not give."""
    try:
        signature = inspect.signature(function)
    except ValueError:  # some functions written in C have no signature
        return []
    return [
        p.name
        for p in signature.parameters.values()
        if p.default is p.empty and p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL) and p.name not in GIVEN
    ]


def _parameters(function: RewardFunction) -> set[str] | None:
    """Names that `function` takes by keyword; None when it takes any."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except ValueError:
        return None
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return None
    return {p.name for p in parameters}
