"""Reads the run's settings from YAML and `key.sub=value` overrides, refused with a remedy when wrong, and
writes them.

Everything that can be judged without looking at the machine is judged here; what needs the machine (GPUs,
paths, imports) is judged by `asyncrl.plan.preflight`.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, get_origin

from pydantic import BaseModel, ValidationError

from asyncrl.config import presets, yaml_tree
from asyncrl.config.impossible import impossible
from asyncrl.config.messages import explain
from asyncrl.config.schema import Config
from asyncrl.errors import ConfigError
from asyncrl.section import section_of


class InvalidSettings(ConfigError):  # noqa: N818 - it is the settings that are wrong
    """Some settings are wrong.

    rest: a config of the others; None where they make none. What contradicts itself is in it.
    """

    def __init__(self, message: str, rest: Config | None) -> None:
        super().__init__(message)
        self.rest = rest


def load(path: str | Path, overrides: Iterable[str] = ()) -> Config:
    """Read a YAML file, or the preset of that name where there is no such file (`asyncrl.config.presets`),
    and apply `key.sub=value` overrides (values are YAML). Raises `ConfigError`."""
    found = presets.find(Path(path))
    return from_tree(yaml_tree.read(found), source=str(path), overrides=overrides)


def from_tree(tree: Mapping[str, Any], source: str = "config", overrides: Iterable[str] = ()) -> Config:
    """Build a `Config` from nested mappings and `key.sub=value` overrides. Raises `ConfigError` with one line
    per wrong key: where it was set (`source`, or the command line for overridden keys), its value, and what
    would be right."""
    tree = copy.deepcopy(dict(tree))
    overridden = [yaml_tree.override(tree, text) for text in overrides]
    try:
        config = Config.model_validate(tree)
    except ValidationError as error:
        lines = explain(error, valid_keys=list(keys()), source=source, overridden=overridden)
        raise InvalidSettings("\n".join(lines), _rest(tree, error)) from None
    if problems := list(impossible(config)):
        where = f"{source} with the overrides" if overridden else source
        raise InvalidSettings("\n".join(f"{where}: {problem}" for problem in problems), config)
    return config


def _rest(tree: dict[str, Any], error: ValidationError) -> Config | None:
    """The settings without those that are wrong, which have their defaults; None where they have none."""
    places = dict.fromkeys(e["loc"] for e in error.errors(include_url=False) if e["loc"])
    for place in reversed(places):  # of a list, the last first
        section: Any = tree
        try:
            for key in place[:-1]:
                section = section[key]
            del section[place[-1]]
        except (KeyError, IndexError, TypeError):
            return None
    try:
        return Config.model_validate(tree)
    except ValidationError:
        return None


def dump(config: Config, *, changed_only: bool = False) -> str:
    """The resolved config as YAML that `load` reads back. changed_only: without what has its default."""
    return yaml_tree.write(config.model_dump(mode="json", exclude_defaults=changed_only))


def keys(section: type[BaseModel] = Config, prefix: str = "") -> Iterator[str]:
    """Every dotted key of the tree, sections included; `*` stands for the number of a list's item, `NAME`
    for a name of your own."""
    for name, info in section.model_fields.items():
        yield prefix + name
        nested = section_of(info.annotation)
        if nested is not None:
            of_each = {list: "*.", dict: "NAME."}.get(get_origin(info.annotation), "")
            yield from keys(nested, f"{prefix}{name}.{of_each}")
