"""Finds reward functions by name, and selects the arguments that they accept."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from asyncrl.data.values import TAKEN_NAMES
from asyncrl.resolve import quoted

RewardFunction = Callable[..., Any]


def accepted_arguments(function: RewardFunction, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The keyword `arguments` that `function` takes. Raises `TypeError` that names any missing ones."""
    missing = missing_columns(function, arguments)
    if missing:
        raise TypeError(
            f"it needs {quoted(missing)}, but the dataset has no such column; available: "
            f"{quoted(sorted(arguments))}"
        )
    parameters = _parameters(function)
    if parameters is None:
        return dict(arguments)
    return {name: value for name, value in arguments.items() if name in parameters}


def missing_columns(function: RewardFunction, columns: Iterable[str]) -> list[str]:
    """The required arguments of `function` that neither `columns` nor AsyncRL provides."""
    there = set(columns)
    return [name for name in needed_columns(function) if name not in there]


def needed_columns(function: RewardFunction) -> list[str]:
    """The required arguments of `function` that AsyncRL does not provide."""
    try:
        signature = inspect.signature(function)
    except ValueError:  # some functions written in C have no signature
        return []
    return [
        p.name
        for p in signature.parameters.values()
        if p.default is p.empty
        and p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)
        and p.name not in TAKEN_NAMES
    ]


def _parameters(function: RewardFunction) -> set[str] | None:
    """Names that `function` takes by keyword; None if it takes any."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except ValueError:
        return None
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return None
    return {p.name for p in parameters}
