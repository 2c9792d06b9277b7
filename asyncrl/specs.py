"""Specs: each says all that the package asks of one of several things of a kind, such as a trainer backend or
an engine. One is found by the name of its folder, or is a user's own."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from pydantic import create_model

from asyncrl.errors import ConfigError
from asyncrl.resolve import find, quoted
from asyncrl.section import Section


class Spec:
    """What every kind of spec says to the settings. Importing one must be cheap: no torch."""

    folder = ""
    """The folder of the package in which those of its kind are."""
    key = ""
    """The setting that names one of its kind."""
    settings: type[Section] = Section
    """Of the section `settings` beside the key that names it; none by default."""

    def impossible(self, config: Any) -> Iterator[str]:
        """What cannot work in a `Config`, each with its reason and remedy."""
        yield from ()


S = TypeVar("S", bound=Spec)
M = TypeVar("M", bound=Section)


def find_spec(kind: type[S], folder: str, name: str) -> S:
    """The spec of a name: `SPEC` of `asyncrl/FOLDER/NAME/spec.py`, or a user's own, given as
    `package.module:NAME` or `path/file.py:NAME`.

    kind: what it has to be. Raises `ConfigError` where there is none.
    """
    if ":" not in name:
        found = _module(folder, name, "spec").SPEC
    else:
        found = find(name, what=folder.rpartition("/")[2].removesuffix("s"))
    if not isinstance(found, kind):
        raise ConfigError(
            f"`{name}` is of type {type(found).__name__}; give an object of a class that derives from "
            f"{kind.__module__}.{kind.__qualname__}"
        )
    if found.folder != folder:
        raise ConfigError(f"`{name}` is a spec for {found.folder}; give one for {folder}")
    return found


def spec_name(folder: str) -> Callable[[str], str]:
    """For the validation of a setting: refuses, by a `ConfigError`, what is neither the name of a spec in
    `asyncrl/FOLDER` nor a user's own that can be imported."""

    def check(name: str) -> str:
        names = names_in(folder)
        if ":" in name:
            find_spec(Spec, folder, name)
        elif name not in names:
            near = difflib.get_close_matches(name, names, n=1)
            meant = f"did you mean {quoted(near)}? There" if near else "there"
            raise ConfigError(
                f"{meant} are {quoted(names)}, and your own as package.module:NAME or path/file.py:NAME"
            )
        return name

    return check


def sections_in(folder: str) -> dict[str, type[Section]]:
    """The settings of those that come with the package, by name: `Settings` of
    `asyncrl/FOLDER/NAME/settings.py`, whose docstring says in lower case what the thing is."""
    return {name: _module(folder, name, "settings").Settings for name in names_in(folder)}


def choices(folder: str) -> str:
    """What can be named, for the documentation of a setting."""
    built_in = (f"`{name}`: {section.__doc__}" for name, section in sections_in(folder).items())
    return f"{' '.join(built_in)} Or your own: `package.module:NAME` or `path/file.py:NAME`."


def with_sections(folder: str) -> Callable[[type[M]], type[M]]:
    """Adds to a section of the settings those of what comes with the package (`sections_in`), by name; none
    that has no keys."""

    def add(section: type[M]) -> type[M]:
        sections = sections_in(folder).items()
        own: dict[str, Any] = {name: (kind, kind()) for name, kind in sections if kind.model_fields}
        return create_model(section.__name__, __base__=section, __module__=section.__module__, **own)

    return add


def specs_of(kind: type[S]) -> dict[str, S]:
    """Those of a kind that come with the package, by name."""
    return {name: find_spec(kind, kind.folder, name) for name in names_in(kind.folder)}


def those(kind: type[S], are: Callable[[S], bool]) -> str:
    """The settings that choose one of a kind of which something is so, as an advice."""
    return " or ".join(f"{kind.key}={name}" for name, spec in specs_of(kind).items() if are(spec))


def _module(folder: str, name: str, part: str) -> Any:
    return importlib.import_module(f"asyncrl.{folder.replace('/', '.')}.{name}.{part}")


def names_in(folder: str) -> list[str]:
    """Those that come with the package: the folders in `asyncrl/FOLDER` that have a spec."""
    return sorted(path.parent.name for path in (Path(__file__).parent / folder).glob("*/spec.py"))
