"""Finding reward functions by name, and calling them with what they accept."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import inspect
import sys
import traceback
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, cast

from asyncrl.config import ConfigError

RewardFunction = Callable[..., Any]

GIVEN = ("prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric")
"""Keyword arguments that every reward function can ask for, besides the dataset's columns."""


def resolve(spec: str, base: Path | None = None) -> RewardFunction:
    """The function named by `package.module:function` or `path/file.py:function`.

    base: folder that file paths are relative to and in which modules are looked for first; by default the
        current directory. It is added to `sys.path`, and so is the folder of a file.

    A module or file is imported once in a process, whatever number of functions it gives. Raises
    `ConfigError` that names the spec, the reason and the remedy.
    """
    base = (base or Path.cwd()).resolve()
    source, colon, name = spec.rpartition(":")
    if not colon or not source or not name:
        raise ConfigError(
            f"reward function `{spec}`: write it as package.module:function or path/file.py:function"
        )
    try:
        if source.endswith(".py") or "/" in source:
            module = _import_file(base / Path(source).expanduser(), spec)
        else:
            module = _import_module(source, base, spec)
    except (Exception, SystemExit) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(
            f"reward function `{spec}`: importing {source} failed: {_explained(error)}; correct "
            f"that, or name another function"
        ) from error
    return _attribute(module, name, spec)


def accepted(function: RewardFunction, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the keyword `arguments` that `function` takes. Raises `TypeError` naming any that it lacks."""
    missing = missing_columns(function, arguments)
    if missing:
        raise TypeError(
            f"it needs {_names(missing)}, for which the dataset has no column; there are "
            f"{_names(sorted(arguments))}"
        )
    parameters = _parameters(function)
    if parameters is None:
        return dict(arguments)
    return {name: value for name, value in arguments.items() if name in parameters}


def missing_columns(function: RewardFunction, columns: Iterable[str]) -> list[str]:
    """The arguments that `function` cannot do without and that neither `columns` nor AsyncRL gives."""
    try:
        signature = inspect.signature(function)
    except ValueError:  # some functions written in C have no signature
        return []
    there = {*columns, *GIVEN}
    return [
        p.name
        for p in signature.parameters.values()
        if p.default is p.empty and p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL) and p.name not in there
    ]


def _parameters(function: RewardFunction) -> set[str] | None:
    """Names that `function` takes by keyword; None when it takes any."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except ValueError:
        return None
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return None
    return {p.name for p in parameters}


def _import_module(name: str, base: Path, spec: str) -> ModuleType:
    _put_on_path(base)
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise
        raise ConfigError(
            f"reward function `{spec}`: there is no module `{error.name}` in {base} or among the installed "
            f"packages; install it, start from its folder, or name a file: path/file.py:function"
        ) from error


def _import_file(path: Path, spec: str) -> ModuleType:
    path = path.resolve()
    if not path.is_file():
        raise ConfigError(
            f"reward function `{spec}`: there is no file {path}; paths are relative to the current directory"
        )
    key = str(path)
    if key in sys.modules:
        return sys.modules[key]
    module_spec = importlib.util.spec_from_file_location(key, path)
    if module_spec is None or module_spec.loader is None:
        raise ConfigError(f"reward function `{spec}`: {path} is no Python file; it should end in .py")
    _put_on_path(path.parent)
    module = sys.modules[key] = importlib.util.module_from_spec(module_spec)
    try:
        module_spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[key]
        raise
    return module


def _attribute(module: ModuleType, name: str, spec: str) -> RewardFunction:
    where = module.__file__ or module.__name__
    if not hasattr(module, name):
        functions = [n for n, value in vars(module).items() if callable(value) and not n.startswith("__")]
        near = difflib.get_close_matches(name, functions, n=3) or functions[:8]
        hint = f"did you mean {_names(near, ' or ')}?" if near else "it defines no function at all"
        raise ConfigError(f"reward function `{spec}`: {where} has no `{name}`; {hint}")
    function = getattr(module, name)
    if not callable(function):
        raise ConfigError(
            f"reward function `{spec}`: `{name}` in {where} is of type {type(function).__name__} and "
            f"cannot be called; name a function"
        )
    return cast(RewardFunction, function)


def _put_on_path(folder: Path) -> None:
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))


def _explained(error: BaseException) -> str:
    """The last line of the traceback, and the place in the user's code that it points to."""
    last = "".join(traceback.format_exception_only(error)).strip().splitlines()[-1]
    if isinstance(error, SyntaxError):
        return f"{last} ({error.filename}, line {error.lineno})"
    frames = [f for f in traceback.extract_tb(error.__traceback__) if "importlib" not in f.filename]
    frames = [f for f in frames if f.filename != __file__]
    return f"{last} ({frames[-1].filename}, line {frames[-1].lineno})" if frames else last


def _names(names: Iterable[str], separator: str = ", ") -> str:
    return separator.join(f"`{name}`" for name in names)
