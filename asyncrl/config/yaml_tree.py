"""Trees of settings as text: YAML files, and `key.sub=value` overrides of what they hold. Knows no schema."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import yaml

from asyncrl.errors import ConfigError

COMMAND_LINE = "the command line"
"""What messages call the place that overrides come from."""


class _Loader(yaml.SafeLoader):
    """Safe YAML with the scalars of YAML 1.2: `1e-6` is a number, while `no`, `2026-01-31`, `1:30` and `010`
    are not turned into false, a date, 90 and 8. Keys given twice are refused."""

    yaml_implicit_resolvers = {}  # noqa: RUF012 - PyYAML's own name and type; none of its YAML 1.1 scalars

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        first_lines: dict[str, int] = {}
        for key, _ in node.value:
            line = key.start_mark.line + 1
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.MarkedYAMLError(problem="a key must be a word", problem_mark=key.start_mark)
            if key.value in first_lines:
                raise yaml.MarkedYAMLError(
                    problem=f"the key `{key.value}` is already given in line {first_lines[key.value]}",
                    problem_mark=key.start_mark,
                )
            first_lines[key.value] = line
        return node


_FLOAT = r"[-+]?(\d+(_\d+)*\.?\d*|\.\d+)([eE][-+]?\d+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)"
for _tag, _pattern, _first in (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?\d+(_\d+)*", list("-+0123456789")),
    ("float", _FLOAT, list("-+.0123456789")),
    ("merge", r"<<", ["<"]),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), _first)
_Loader.add_constructor("tag:yaml.org,2002:int", lambda loader, node: int(node.value))


class _Dumper(yaml.SafeDumper):
    """Quotes every text that `_Loader` or a YAML 1.1 reader would take for something else."""

    yaml_implicit_resolvers = {  # noqa: RUF012 - PyYAML's own name and type
        first: yaml.SafeDumper.yaml_implicit_resolvers.get(first, []) + ours
        for first, ours in _Loader.yaml_implicit_resolvers.items()
    }


def write(tree: dict[str, Any]) -> str:
    """YAML that `read` reads back to the same tree."""
    return yaml.dump(tree, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def text(value: Any) -> str:
    """One value on one line, as `override` takes it."""
    flow = yaml.dump(value, Dumper=_Dumper, default_flow_style=True, allow_unicode=True, width=math.inf)
    return flow.removesuffix("...\n").strip()


def read(path: Path) -> dict[str, Any]:
    """The mapping that a YAML file holds. Raises `ConfigError` with file, line and column of the fault."""
    try:
        tree = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except OSError as error:
        raise ConfigError(f"cannot read the config file {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{path} is not a text file in UTF-8: {error.reason} at byte {error.start}"
        ) from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}{_where(error)}") from None
    if not isinstance(tree, dict):
        found = "nothing" if tree is None else repr(tree)
        raise ConfigError(f"{path}: expected sections such as `model:` and `data:` at the top, found {found}")
    return tree


def override(tree: dict[str, Any], text: str) -> str:
    """Apply one `key.sub=value` (the value in YAML; a number steps into a list) to `tree`, in place, and
    return the key. Raises `ConfigError`."""
    key, value_text = _setting(text)
    try:
        value = yaml.load(value_text, _Loader)
    except yaml.YAMLError as error:
        raise ConfigError(
            f"{COMMAND_LINE}: `{key}`: {value_text!r} is not a YAML value, at {_where(error)[1:]}"
        ) from None
    *parents, last = key.split(".")
    node: Any = tree
    for depth, part in enumerate(parents):
        index = _index(node, part, key, parents[:depth])
        if isinstance(node, dict) and node.get(index) is None:
            node[index] = {}
        node = node[index]
    node[_index(node, last, key, parents)] = value
    return key


def values(text: str) -> tuple[str, list[str]]:
    """`key.sub=value,value,...`: the key, and the text of each value as `override` takes it. A comma inside
    brackets or quotes separates nothing. Raises `ConfigError`."""
    key, values_text = _setting(text)
    try:
        items = yaml.compose(f"[{values_text}]", _Loader).value
    except yaml.YAMLError as error:
        problem = getattr(error, "problem", None) or error
        raise ConfigError(
            f"{COMMAND_LINE}: `{key}`: {values_text!r} are not YAML values separated by commas: {problem}"
        ) from None
    return key, [values_text[i.start_mark.index - 1 : i.end_mark.index - 1].strip() for i in items]


def _setting(text: str) -> tuple[str, str]:
    """Key and value of `key.sub=value`."""
    key, equals, value_text = text.partition("=")
    key = key.strip()
    if not equals or not all(part.strip() for part in key.split(".")):
        raise ConfigError(f"{COMMAND_LINE}: cannot read `{text}`: write a setting as key.sub=value")
    return key, value_text


def _index(node: Any, part: str, key: str, path: list[str]) -> str | int:
    """What to index `node` (found at `path`) with, on the way to `key`."""
    if isinstance(node, dict):
        return part
    at = f"{COMMAND_LINE}: `{key}`: `{'.'.join(path)}`"
    if not isinstance(node, list):
        raise ConfigError(f"{at} is the value {node!r} in the config file, not a section")
    if not part.isdecimal():
        raise ConfigError(f"{at} is a list: its items are numbered from 0, `{part}` is not a number")
    if int(part) >= len(node):
        raise ConfigError(f"{at} is a list of {len(node)}, numbered from 0: there is no item {part}")
    return int(part)


def _where(error: yaml.YAMLError) -> str:
    """`:line:column: problem` of a YAML error, as compilers write it."""
    if not isinstance(error, yaml.MarkedYAMLError) or error.problem_mark is None:
        return f": {error}"
    context = f" ({error.context})" if error.context else ""
    return f":{error.problem_mark.line + 1}:{error.problem_mark.column + 1}: {error.problem}{context}"
