"""`asyncrl config-docs`: writes the reference of all settings from their schema."""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Iterator
from itertools import pairwise
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo

from asyncrl.config import Config, Section, section_of

_INTRODUCTION = """\
# Configuration

<!-- Written by `asyncrl config-docs` from asyncrl/config. Do not edit: change the docstrings there. -->

A run is described by one YAML file. Any key can be overridden on the command line as `key.sub=value`
(the value in YAML; list items by number, from 0):

    asyncrl-launch --config quickstart.yaml run.seed=1 reward.functions.0.weight=0.5

Unknown keys, wrong types and combinations that cannot work are refused before any process starts.
`asyncrl-launch --config FILE --dry-run` shows the resolved settings and what they imply.

A key without a default is required."""


_ITEM: dict[Any, str] = {list: ".N", dict: ".NAME"}
"""What stands for one of several sections, by what holds them."""


def render() -> str:
    """The reference as Markdown: a table for each section."""
    return "\n".join([_INTRODUCTION, *_tables(Config, "")])


def meanings(section: type[Section]) -> dict[str, str]:
    """What each key of a section means: the docstring below it, but for those that are made of a table.
    (Pydantic's own way reads the sources in every process that has a config.)"""
    found: dict[str, str] = {}
    for base in reversed(section.__mro__[: section.__mro__.index(Section)]):
        (body,) = ast.parse(textwrap.dedent(inspect.getsource(base))).body
        assert isinstance(body, ast.ClassDef)
        for key, below in pairwise(body.body):
            match key, below:
                case (
                    ast.AnnAssign(target=ast.Name(id=name)),
                    ast.Expr(value=ast.Constant(value=str() as text)),
                ):
                    found[name] = " ".join(text.split())
    return {name: field.description or found.get(name, "") for name, field in section.model_fields.items()}


def _tables(section: type[Section], prefix: str) -> Iterator[str]:
    """The section's own keys (including lists of sections), then its sections."""
    means = meanings(section)
    own = {name: f for name, f in section.model_fields.items() if not _is_section(f)}
    if own:
        yield "\n| key | type | default | meaning |\n|---|---|---|---|"
        yield from (_row(f"{prefix}{name}", field, means[name]) for name, field in own.items())
    for name, field in section.model_fields.items():
        if inner := section_of(field.annotation):
            key = f"{prefix}{name}{_ITEM.get(get_origin(field.annotation), '')}"
            yield f"\n{'###' if prefix else '##'} `{key}`"
            yield from _tables(inner, f"{key}.")


def _is_section(field: FieldInfo) -> bool:
    return section_of(field.annotation) is not None and get_origin(field.annotation) not in _ITEM


def _row(key: str, field: FieldInfo, meaning: str) -> str:
    default = "" if field.is_required() else f"`{_yaml(field.default)}`"
    cells = (f"`{key}`", _type(field), default, meaning)
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def _type(field: FieldInfo) -> str:
    words = _type_words(field.annotation)
    bounds = ", ".join(
        f"{sign} {value:g}"
        for sign, name in ((">", "gt"), ("≥", "ge"), ("<", "lt"), ("≤", "le"))
        for value in (getattr(m, name, None) for m in field.metadata)
        if value is not None
    )
    return f"{words} {bounds}".strip()


def _type_words(annotation: Any) -> str:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in arguments)
    if origin in (Union, UnionType):
        return " or ".join(_type_words(a) for a in sorted(arguments, key=lambda a: a is NoneType))
    if origin is list:
        return f"list of {_type_words(arguments[0])}s"
    if origin is dict:
        return "mapping"
    if origin is tuple:
        return f"list of {len(arguments)} {_type_words(arguments[0])}s"
    if hasattr(annotation, "__metadata__"):  # Annotated: the docstring states its bounds
        return _type_words(arguments[0])
    names = {
        str: "text",
        int: "integer",
        float: "number",
        bool: "true or false",
        NoneType: "null",
        Any: "value",
    }
    return names.get(annotation, "section")


def _yaml(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return str(value).lower().replace("none", "null")
    if isinstance(value, float):
        return f"{value:g}"
    return str(list(value)) if isinstance(value, tuple) else str(value)
