"""Paths as people write them."""

from __future__ import annotations

import os
from pathlib import Path

from asyncrl.errors import ConfigError


def user_path(path: str | Path, called: str) -> Path:
    """What a person means by `path`: `~` is a home folder. It need not be there. called: what messages call
    it, such as `data.path=FILE`.

    Raises `ConfigError` where the system would not even look for it: no such user, no permission, no name
    that a file can have.
    """
    try:
        found = Path(path).expanduser()
    except RuntimeError:
        raise ConfigError(
            f"{called}: nobody's home folder is {Path(path).parts[0]} here; write the whole path"
        ) from None
    try:
        is_folder = found.stat() and found.is_dir()
    except (FileNotFoundError, NotADirectoryError):
        return found
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise ConfigError(f"{called}: cannot be looked for ({reason}); name another place") from None
    if not os.access(found, os.R_OK | (os.X_OK if is_folder else 0)):
        raise ConfigError(f"{called}: no permission to read {found}; name another place")
    return found


def check_can_be_written(folder: Path, called: str) -> None:
    """Raises `ConfigError` unless `folder` can be made, or be written into."""
    nearest = nearest_folder(folder)
    if not nearest.is_dir():
        raise ConfigError(f"{called}: {nearest} is a file, not a folder; name another place")
    if not os.access(nearest, os.W_OK | os.X_OK):
        is_read_only = os.statvfs(nearest).f_flag & os.ST_RDONLY
        reason = "its disk is read-only" if is_read_only else "no permission"
        raise ConfigError(f"{called}: cannot write into {nearest} ({reason}); name another place")


def nearest_folder(path: Path) -> Path:
    """The path, or the nearest above it that is there."""
    return next(p for p in (path, *path.absolute().parents) if p.exists())
