"""A section of the run's settings: the class that each part of the system derives its own from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, model_validator


class Section(BaseModel):
    """One section of the tree: unknown keys are refused, values are not coerced across kinds."""

    model_config = ConfigDict(
        extra="forbid",
        strict=True,
        validate_default=True,
        allow_inf_nan=False,
        ser_json_inf_nan="constants",  # an infinity in a mapping of any values stays one
    )

    @model_validator(mode="before")
    @classmethod
    def _empty_means_defaults(cls, value: Any) -> Any:
        """YAML reads a section whose keys are all commented out as null."""
        return {} if value is None else value


S = TypeVar("S", bound=Section)


def with_values(section: S, values: Mapping[str, Any]) -> S:
    """The same settings with other values, by their keys (`reward.models.0.device`). Nothing is checked."""
    for key, value in values.items():
        section = _replaced(section, key.split("."), value)
    return section


def _replaced(node: Any, path: list[str], value: Any) -> Any:
    if not path:
        return value
    first, *rest = path
    if isinstance(node, list):
        return [_replaced(item, rest, value) if i == int(first) else item for i, item in enumerate(node)]
    return node.model_copy(update={first: _replaced(getattr(node, first), rest, value)})


def flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The values of nested mappings by dotted key."""
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def section_of(annotation: Any) -> type[Section] | None:
    """The section class that a field's annotation names (directly, in an optional or in a list), if any."""
    for candidate in (annotation, *get_args(annotation)):
        if isinstance(candidate, type) and issubclass(candidate, Section):
            return candidate
    return None
