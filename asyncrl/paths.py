"""Paths as people write them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from asyncrl.errors import ConfigError


class Under:
    """As a class attribute: the path of the file or folder `name` in the `path` of an object."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __get__(self, owner: Any, _: type | None = None) -> Path:
        folder: Path = owner.path
        return folder / self._name


def user_path(path: str | Path, called: str) -> Path:
    """The path with `~` expanded; it need not exist. called: its name in messages, such as `data.path=FILE`.

    Raises `ConfigError` where the path cannot be accessed: no such user, no permission, or an impossible
    name.
    """
    try:
        found = Path(path).expanduser()
    except RuntimeError:
        raise ConfigError(
            f"{called}: no user here has the home folder {Path(path).parts[0]}; write the full path"
        ) from None
    try:
        is_folder = found.stat() and found.is_dir()
    except (FileNotFoundError, NotADirectoryError):
        return found
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise ConfigError(f"{called}: cannot be accessed ({reason}); choose another place") from None
    if not os.access(found, os.R_OK | (os.X_OK if is_folder else 0)):
        raise ConfigError(f"{called}: no permission to read {found}; choose another place")
    return found


def check_can_be_written(folder: Path, called: str) -> None:
    """Raises `ConfigError` unless `folder` can be created or written to."""
    nearest = nearest_folder(folder)
    if not nearest.is_dir():
        raise ConfigError(f"{called}: {nearest} is a file, not a folder; choose another place")
    if not os.access(nearest, os.W_OK | os.X_OK):
        is_read_only = os.statvfs(nearest).f_flag & os.ST_RDONLY
        reason = "its disk is read-only" if is_read_only else "no permission"
        raise ConfigError(f"{called}: cannot write to {nearest} ({reason}); choose another place")


def replace_file(path: Path, content: bytes) -> None:
    """Write a file that others may read at any time: they find the old content or the new, never a part."""
    aside = path.with_suffix(".new")
    try:
        aside.write_bytes(content)
    except OSError:  # such as of a full disk, which has room for others then
        aside.unlink(missing_ok=True)
        raise
    aside.replace(path)


def nearest_folder(path: Path) -> Path:
    """The path, or its nearest ancestor that exists."""
    return next(p for p in (path, *path.absolute().parents) if p.exists())
