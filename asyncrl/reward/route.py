"""Chooses the parts that score a row by the value of one of its columns."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from asyncrl.config import RewardConfig


class RouteError(ValueError):
    """There is no route for a row. The message says what its column holds."""


def scoring_parts(config: RewardConfig, columns: Mapping[str, Any]) -> list[str]:
    """Names of the functions, judges and models that score a row with these columns, in the order of the sum.
    Raises `RouteError`."""
    names = [part.label for part in config.scoring.values()]
    route = config.route
    if route.column is None:
        return names
    value = _value(columns, route.column)
    chosen = route.parts.get(value)
    if chosen is None:
        raise RouteError(
            f"its `{route.column}` is {value!r}, which reward.route.parts does not list (it has "
            f"{', '.join(route.parts)})"
        )
    routed = {name for parts in route.parts.values() for name in parts}
    scoring = [name for name in names if name in chosen or name not in routed]
    if not scoring:
        raise RouteError(f"reward.route.parts.{value} is empty: nothing scores it")
    return scoring


def _value(columns: Mapping[str, Any], column: str) -> str:
    """The text in `column` (dots lead into nested columns); whole numbers and booleans as text."""
    found: Any = columns
    for name in column.split("."):
        if not isinstance(found, Mapping) or name not in found:
            raise RouteError(f"it has no column `{column}` (reward.route.column)")
        found = found[name]
    if not isinstance(found, str | int):
        raise RouteError(f"its `{column}` is {found!r}; reward.route.column must hold text")
    return found if isinstance(found, str) else str(found).lower()
