"""Converts values of a dataset's columns to values that can be sent to other processes: JSON's, and bytes."""

from __future__ import annotations

import datetime
import decimal
from typing import Any, TypeAlias

Message: TypeAlias = dict[str, Any]
"""One turn of a conversation: `role`, `content` and any other keys of the dataset."""

TAKEN_NAMES = ("prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric")
"""Keyword arguments that every reward function can take in addition to the dataset's columns, which must not
have these names."""
_INT64 = range(-(2**63), 2**64)


class UnusableValueError(ValueError):
    """A value cannot be sent to reward functions. The message names its place and its kind."""


def portable(value: Any, place: str) -> Any:
    """`value` with dates and times as ISO 8601 text and decimals as text. Raises `UnusableValueError`."""
    match value:
        case None | bool() | float() | bytes():
            return value
        case str():
            try:
                value.encode()
            except UnicodeEncodeError:
                raise UnusableValueError(
                    f"{place} holds an unpaired surrogate, which is not valid text"
                ) from None
            return value
        case int():
            if value not in _INT64:
                raise UnusableValueError(f"{place} holds an integer beyond 64 bits; write it as a string")
            return value
        case list() | tuple():
            return [portable(item, f"{place}[{i}]") for i, item in enumerate(value)]
        case dict():
            return {_key(key, place): portable(item, f"{place}.{key}") for key, item in value.items()}
        case datetime.date() | datetime.time():
            return value.isoformat()
        case decimal.Decimal():
            return str(value)
    raise UnusableValueError(f"{place} holds a {type(value).__name__}, which has no JSON form")


def _key(key: Any, place: str) -> str:
    if not isinstance(key, str):
        raise UnusableValueError(f"{place} has a key that is not a string: {key!r}")
    portable(key, f"a key of {place}")
    return key
