"""Specs: each says all that the package asks of one of several things of a kind, such as a trainer backend or
an engine. One is found by the name of its folder, or is a user's own."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import TypeVar

from asyncrl.errors import ConfigError
from asyncrl.resolve import find, quoted

S = TypeVar("S")


def find_spec(kind: type[S], folder: str, name: str, key: str) -> S:
    """The spec that a setting names: `SPEC` of `asyncrl/FOLDER/NAME/spec.py`, or a user's own, given as
    `package.module:NAME` or `path/file.py:NAME`.

    kind: what it has to be. key: the setting. Raises `ConfigError` for one that there is not.
    """
    own = "your own as package.module:NAME or path/file.py:NAME"
    if ":" not in name:
        names = names_in(folder)
        if name not in names:
            near = difflib.get_close_matches(name, names, n=1)
            meant = f"did you mean {quoted(near)}? " if near else ""
            raise ConfigError(f"{meant}there are {quoted(names)}, and {own}")
        name = f"asyncrl.{folder.replace('/', '.')}.{name}.spec:SPEC"
    found = find(name, what=key)
    if not isinstance(found, kind):
        raise ConfigError(
            f"{key}=`{name}` is of type {type(found).__name__}; give an object of a class that derives from "
            f"{kind.__module__}.{kind.__qualname__}"
        )
    return found


def names_in(folder: str) -> list[str]:
    """Those that come with the package: the folders in `asyncrl/FOLDER` that have a spec."""
    return sorted(path.parent.name for path in (Path(__file__).parent / folder).glob("*/spec.py"))
