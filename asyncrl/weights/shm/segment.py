"""Named memory that the processes of one host share: a file in `/dev/shm`, mapped.

On Linux that file is a POSIX shared-memory object (`shm_open` makes the very same one), elsewhere it is a
file in the temporary folder. `multiprocessing.shared_memory` is left aside on purpose: its resource tracker
unlinks segments that a reader merely attached, or prints about them, and it grows them with `ftruncate`, so
that a full `/dev/shm` kills the writer with SIGBUS instead of an error.
"""

from __future__ import annotations

import errno
import fcntl
import glob
import mmap
import os
import re
import tempfile
import time
from pathlib import Path

from asyncrl.weights.mapping import HostMap
from asyncrl.weights.source import WeightsError

BUFFERS = 2
"""Segments of one publisher, of two and more; version v is in segment v modulo their number."""
MOST_BUFFERS = 8
_SMALL_BYTES = 64 << 20

_YOUNG_S = 10.0
_NO_FOLLOW = getattr(os, "O_NOFOLLOW", 0)


def buffers_for_far(version_bytes: int) -> int:
    """Segments of a publisher that engines of other hosts read from: of small versions more, which are on
    their way for longer than a step takes."""
    return max(BUFFERS, min(MOST_BUFFERS, _SMALL_BYTES // max(1, version_bytes)))


def segment_path(prefix: str, buffer: int) -> Path:
    """The file of a run's segment number `buffer`. `prefix` must be unique to the run on this host."""
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,199}", prefix):
        raise ValueError(
            f"{prefix!r} cannot name shared memory: use 1 to 200 letters, digits, `.`, `_` or `-`, "
            "and no leading dot"
        )
    return shared_folder() / f"{prefix}-{buffer}"


def create(path: Path, n_bytes: int) -> HostMap:
    """A new, zeroed, writable segment that only this user can open. A left-over of the same name is replaced.

    Raises `WeightsError` when the memory is not there.
    """
    try:
        path.unlink(missing_ok=True)
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | _NO_FOLLOW, 0o600)
    except OSError as error:
        raise WeightsError(
            f"{path.parent}, through which weights are shared, cannot be written: {error.strerror}"
        ) from error
    try:
        # Held by the mapping (it keeps the open file) until its process ends: what is not locked is
        # abandoned.
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        _reserve(fd, n_bytes)
        return HostMap(fd, n_bytes)
    except OSError as error:
        path.unlink(missing_ok=True)
        if error.errno not in (errno.ENOSPC, errno.ENOMEM, errno.EFBIG):
            raise
        raise WeightsError(
            f"{path.parent} has no room for {n_bytes:,} bytes of weights ({BUFFERS} such buffers are needed, "
            f"{_free_bytes(path.parent):,} bytes are free); enlarge it (containers: `--shm-size`; "
            "Kubernetes: an `emptyDir` with `medium: Memory`)"
        ) from None
    finally:
        os.close(fd)


def attach(path: Path, n_bytes: int, access: int = mmap.ACCESS_READ) -> mmap.mmap:
    """Map an existing segment, by default read-only. Raises `WeightsError` when it is gone, smaller than
    `n_bytes`, or no shared memory at all: the path comes from a message."""
    if path.parent != shared_folder() or not path.name.rpartition("-")[2].isdigit():
        raise WeightsError(f"{path} names no shared memory of weights")
    try:
        fd = os.open(path, os.O_RDONLY | _NO_FOLLOW)
    except FileNotFoundError:
        raise WeightsError(
            f"the shared memory {path} is gone: its publisher has closed, or runs on another host"
        ) from None
    try:
        size = os.fstat(fd).st_size
        if size < n_bytes:
            raise WeightsError(
                f"the shared memory {path} holds {size:,} bytes, not the announced {n_bytes:,}"
            )
        return mmap.mmap(fd, n_bytes, access=access)
    finally:
        os.close(fd)


def sweep(prefix: str) -> list[Path]:
    """Remove what a publisher of this prefix left behind when it was killed. Returns the removed segments.

    Readers that have them mapped keep their memory; nobody can attach any more.
    """
    removed = []
    for buffer in range(MOST_BUFFERS):
        path = segment_path(prefix, buffer)
        try:
            path.unlink()
        except FileNotFoundError:
            continue
        removed.append(path)
    return removed


def sweep_abandoned(name_prefix: str) -> list[Path]:
    """Remove the segments of every publisher whose process is gone, whatever its run. Returns the removed
    ones.

    name_prefix: how the prefixes of all runs begin.
    """
    removed = []
    for path in shared_folder().glob(f"{glob.escape(name_prefix)}*"):
        try:
            fd = os.open(path, os.O_RDWR | _NO_FOLLOW)
        except OSError:
            continue  # gone meanwhile, or another user's
        try:
            if time.time() - os.fstat(fd).st_ctime < _YOUNG_S:
                continue  # its publisher may not have locked it yet
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            continue  # in use
        else:
            path.unlink(missing_ok=True)
            removed.append(path)
        finally:
            os.close(fd)
    return removed


def shared_folder() -> Path:
    """Where all shared memory lies."""
    shm = Path("/dev/shm")
    return shm if shm.is_dir() else Path(tempfile.gettempdir())


def _reserve(fd: int, n_bytes: int) -> None:
    """Give the file its pages now: lack of memory is an error here, and would be a SIGBUS in a later copy."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(fd, 0, n_bytes)
    else:
        os.ftruncate(fd, n_bytes)


def _free_bytes(folder: Path) -> int:
    stat = os.statvfs(folder)
    return stat.f_bavail * stat.f_frsize
