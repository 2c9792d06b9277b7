"""Removes the nulls that stand for missing keys, and keeps the nulls that are values.

Arrow gives every object all the keys that any object of its column has, with null for the missing ones. Chat
templates test whether a key is present, so such nulls are removed. A null that an author wrote as a value
stays: an argument of a tool call, the default of a parameter.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pyarrow as pa

IN_MESSAGES = ("arguments",)
"""Keys of a message, at any depth, whose values are the author's own JSON."""
IN_SCHEMAS = ("default", "const", "example", "examples", "enum")
"""Keywords of a JSON schema whose values may be any JSON, including null; no others may be null."""


def without_nulls(value: Any, meant: Collection[str]) -> Any:
    """The value without keys that hold null, at any depth; values under the keys `meant` are left alone."""
    if isinstance(value, dict):
        return {
            key: item if key in meant else without_nulls(item, meant)
            for key, item in value.items()
            if item is not None or key in meant
        }
    if isinstance(value, list):
        return [without_nulls(item, meant) for item in value]
    return value


def without_filled(value: Any, kind: pa.DataType) -> Any:
    """A Python value of Arrow's type `kind`, without the keys that Arrow may have filled in.

    A key that is null in every object of the column has Arrow's type `null`: someone wrote that null, so it
    stays. Where other objects have values, written nulls cannot be told from filled ones.
    """
    import pyarrow as pa

    if isinstance(value, dict) and pa.types.is_struct(kind):
        return {
            field.name: without_filled(value[field.name], field.type)
            for field in kind
            if value[field.name] is not None or pa.types.is_null(field.type)
        }
    if isinstance(value, list) and hasattr(kind, "value_type"):
        return [without_filled(item, kind.value_type) for item in value]
    return value
