"""Nulls that say that a key is not there, and nulls that are values.

Arrow gives every object all the keys that any object of its column has, and null where there was none. Chat
templates ask whether a key is there, so such nulls go. A null that an author wrote as a value stays: an
argument of a tool call, the default of a parameter.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pyarrow as pa

IN_MESSAGES = ("arguments",)
"""Keys of a message, at any depth, whose values are the author's own JSON."""
IN_SCHEMAS = ("default", "const", "example", "examples", "enum")
"""Keywords of a JSON schema whose values are JSON of any kind, null included; no other may be null."""


def without_nulls(value: Any, meant: Collection[str]) -> Any:
    """Without the keys that hold null, at any depth; what lies under the keys `meant` stays as it is."""
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
    """A value of Arrow's type `kind`, as Python has it, without the keys that Arrow may have filled in.

    A key that is null in every object of the column has a type of its own, `null`: somebody wrote that null,
    and it stays. Beside other values nothing tells the written ones from the filled.
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
