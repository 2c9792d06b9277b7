"""What a config names as `package.module:name` or `path/file.py:name`, functions for the most part."""

from __future__ import annotations

import difflib
import hashlib
import importlib
import importlib.util
import inspect
import os
import sys
import threading
import traceback
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from types import ModuleType
from typing import Any, cast

from asyncrl.errors import ConfigError, NotHereError
from asyncrl.packages import install_command
from asyncrl.paths import user_path

Function = Callable[..., Any]

OWN_PATH = {"PYTHONSAFEPATH": "1"}
"""Environment of the processes that a run starts: Python must not look for its own modules in the working
folder, where a user may have a `token.py`. `resolve` adds folders at the end of the path."""


def forget_own_path() -> None:
    """For a process that was started with `OWN_PATH`: the programs that a user's functions start find their
    modules as usual."""
    for name in OWN_PATH:
        os.environ.pop(name, None)


_folders: set[Path] = set()
"""Folders that were searched for users' modules."""
_under_way = threading.local()
"""`sources`: the imports in progress in a thread, the innermost last."""


def resolve(spec: str, base: Path | None = None, what: str = "function") -> Function:
    """As `find`, of what can be called."""
    function = find(spec, base, what)
    if not callable(function):
        source, _, name = spec.rpartition(":")
        raise ConfigError(
            f"{what} `{spec}`: `{name}` in {source} is of type {type(function).__name__} and cannot be "
            "called; name a function"
        )
    return cast(Function, function)


def resolve_plain(spec: str, what: str) -> Function:
    """As `resolve`, but no class: a call would make an object of it, and give no answer."""
    function = resolve(spec, what=what)
    if isinstance(function, type):
        source, _, name = spec.rpartition(":")
        raise ConfigError(
            f"{what} `{spec}`: `{name}` is a class; name an object of it that can be called: write "
            f"`{name.lower()} = {name}()` below the class, and {source}:{name.lower()} here"
        )
    return function


def find(spec: str, base: Path | None = None, what: str = "function") -> Any:
    """What is named by `package.module:name` or `path/file.py:name`.

    base: the folder that file paths are relative to and that is searched for modules, after everything
        installed; by default the current directory. It is added to the end of `sys.path`, and so is the
        folder of a file: a user's `statistics.py` must not replace Python's.
    what: its name in messages.

    A process imports a module or file once, however many functions come from it. Raises `ConfigError` with
    the spec, the reason and the remedy.
    """
    base = (base or Path.cwd()).resolve()
    source, colon, name = spec.rpartition(":")
    called = f"{what} `{spec}`"
    if not colon or not source or not name:
        raise ConfigError(f"{called}: write it as package.module:function or path/file.py:function")
    sources = _under_way.__dict__.setdefault("sources", [])
    sources.append(source)
    try:
        if source.endswith(".py") or "/" in source:
            module = _import_file(base / user_path(source, called), base, called)
        else:
            module = _import_module(source, base, called)
    except (Exception, SystemExit) as error:
        if isinstance(error, ConfigError):
            raise
        if isinstance(error, ModuleNotFoundError) and error.name is not None:
            raise NotHereError(
                f"{called}: importing {source} failed: {_explained(error)}",
                command=install_command(error.name.partition(".")[0]),
            ) from error
        raise ConfigError(
            f"{called}: importing {source} failed: {_explained(error)}; fix that, or name another function"
        ) from error
    finally:
        sources.pop()
    return _attribute(module, name, called)


def spec_of(function: Any) -> str:
    """The spec by which other processes can find a reward function: `path/file.py:name`, or
    `package.module:name` in a package. A spec is returned as it is.

    Raises `ConfigError` that says what to write instead if they could not find it.
    """
    if isinstance(function, str):
        return function
    name = getattr(function, "__qualname__", None)
    file = file_of(function)
    here = f"reward function {function!r:.100}"
    write = "write it as a `def` at the top of a file and give path/file.py:function"
    if not callable(function) or name is None or isinstance(function, type):
        raise ConfigError(f"{here}: give a function, or its name as package.module:function; {write}")
    if "<" in name:  # <lambda>, <locals>
        kind = (
            "a lambda has no name" if name.endswith("<lambda>") else "a function within another has no name"
        )
        raise ConfigError(f"{here}: {kind} by which the run's other processes could find it; {write}")
    module = sys.modules.get(function.__module__)
    if file is None or not Path(file).is_file() or getattr(module, "__file__", None) is None:
        raise ConfigError(
            f"{here}: it is not in a file that the run's other processes can import (it was defined in a "
            f"notebook or at a prompt); {write} (in a notebook, `%%writefile rewards.py` makes one of a cell)"
        )
    if getattr(module, name, None) is not function:
        raise ConfigError(f"{here}: {module.__name__}.{name} is not this function; {write}")
    if module.__spec__ is not None and module.__spec__.parent:
        return f"{module.__spec__.name}:{name}"
    return f"{Path(module.__file__).absolute()}:{name}"


def importing() -> str | None:
    """The module or file that this thread is importing right now, as its spec names it."""
    sources = _under_way.__dict__.get("sources")
    return sources[-1] if sources else None


def file_of(function: Function) -> str | None:
    """The source file of a function; None if it is not written in Python."""
    for source in (inspect.unwrap(function), type(function)):  # a function, or an object that can be called
        with suppress(TypeError):  # one written in C
            return inspect.getsourcefile(source)
    return None


def loaded_files() -> dict[str, str]:
    """Digests of all Python files imported from users' folders, by path."""
    found = {}
    for name, module in list(sys.modules.items()):
        file = getattr(module, "__file__", None)
        if name == "__main__" or file is None or not file.endswith(".py"):
            continue
        path = Path(file)
        is_users = any(path.is_relative_to(folder) for folder in _folders) and not _is_installed(path)
        if is_users and path.is_file():
            found[str(path)] = digest_of(path)
    return found


def digest_of(path: Path) -> str:
    return hashlib.blake2b(path.read_bytes(), digest_size=16).hexdigest()


def _is_installed(path: Path) -> bool:
    installed = {"site-packages", "dist-packages"}.intersection(path.parts)
    ours = (Path(__file__).parent, Path(hashlib.__file__).parent)
    return bool(installed) or any(path.is_relative_to(folder) for folder in ours)


def _import_module(name: str, base: Path, called: str) -> ModuleType:
    _put_on_path(base)
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise
        raise NotHereError(
            f"{called}: there is no module `{error.name}` in {base} or among the installed packages",
            command="install it, start from its folder, or name a file: path/file.py:function",
        ) from error


def _import_file(path: Path, base: Path, called: str) -> ModuleType:
    path = path.resolve()
    if not path.is_file():
        raise NotHereError(
            f"{called}: there is no file {path}",
            command="write it, or name yours: path/file.py:function",
            advice="paths are relative to the current directory",
        )
    _put_on_path(path.parent)
    _put_on_path(base)
    name = _module_name(path)
    loaded = sys.modules.get(name)
    if loaded is not None and getattr(loaded, "__file__", None) == str(path):  # by us, or by another file
        return loaded
    module_spec = importlib.util.spec_from_file_location(name, path)
    if module_spec is None or module_spec.loader is None:
        raise ConfigError(f"{called}: {path} is not a Python file; its name should end in .py")
    module = sys.modules[name] = importlib.util.module_from_spec(module_spec)
    try:
        module_spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _module_name(path: Path) -> str:
    """The file's own name if importing that name finds this very file, so that its definitions can be pickled
    (as process pools do); otherwise a unique name."""
    name = path.stem
    if name.isidentifier() and name not in sys.stdlib_module_names:
        found = importlib.util.find_spec(name)
        if found is not None and found.origin == str(path):
            return name
    return f"{name}_{hashlib.blake2b(str(path).encode(), digest_size=6).hexdigest()}"


def _attribute(module: ModuleType, name: str, called: str) -> Any:
    where = module.__file__ or module.__name__
    if not hasattr(module, name):
        functions = [n for n, value in vars(module).items() if callable(value) and not n.startswith("__")]
        public = [n for n in vars(module) if not n.startswith("__")]
        near = difflib.get_close_matches(name, public, n=3) or functions[:8]
        hint = f"did you mean {quoted(near, ' or ')}?" if near else "it defines no functions"
        raise ConfigError(f"{called}: {where} has no `{name}`; {hint}")
    return getattr(module, name)


def _put_on_path(folder: Path) -> None:
    _folders.add(folder)
    if str(folder) not in sys.path:
        sys.path.append(str(folder))


def _explained(error: BaseException) -> str:
    """The last line of the traceback, and the place in the user's code where the error arose."""
    last = "".join(traceback.format_exception_only(error)).strip().splitlines()[-1]
    if isinstance(error, SyntaxError):
        return f"{last} ({error.filename}, line {error.lineno})"
    frames = [f for f in traceback.extract_tb(error.__traceback__) if "importlib" not in f.filename]
    frames = [f for f in frames if f.filename != __file__]
    return f"{last} ({frames[-1].filename}, line {frames[-1].lineno})" if frames else last


def quoted(names: Iterable[str], separator: str = ", ") -> str:
    """The names, each in backticks."""
    return separator.join(f"`{name}`" for name in names)
