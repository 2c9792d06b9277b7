"""Which process of a host fetches weights for all of them, and what it has put into shared memory."""

from __future__ import annotations

import fcntl
import os

import msgspec

from asyncrl.weights.shm.segment import shared_folder

_STATE_BYTES = 512


class Held(msgspec.Struct, frozen=True):
    buffers: dict[str, int] = {}
    """Of each version that is there, proven: its buffer, by its identity."""
    arrived_chunks: int = 0
    """So far: by it others see that the process gets on."""


class Seat:
    """A file in shared memory. Whoever has it locked fetches; the system frees it when that process ends, and
    the next takes it."""

    def __init__(self, prefix: str) -> None:
        self._path = shared_folder() / f"{prefix}-seat"
        self._fd: int | None = None

    def take(self) -> bool:
        """Whether this process has it now."""
        fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if self._path.stat().st_ino == os.fstat(fd).st_ino:
                self._fd, fd = fd, -1
                self.write(Held())  # what the one before left is not known to be whole
                return True
        except (BlockingIOError, FileNotFoundError):  # taken, or given up meanwhile
            pass
        finally:
            if fd >= 0:
                os.close(fd)
        return False

    def write(self, held: Held) -> None:
        """In one piece, so that whoever reads meanwhile finds the old or the new."""
        assert self._fd is not None
        os.pwrite(self._fd, msgspec.json.encode(held).ljust(_STATE_BYTES), 0)

    def read(self) -> Held:
        try:
            return msgspec.json.decode(self._path.read_bytes(), type=Held)
        except (FileNotFoundError, msgspec.DecodeError):  # nobody has been here
            return Held()

    def leave(self) -> None:
        if self._fd is not None:
            self._path.unlink(missing_ok=True)
            os.close(self._fd)
            self._fd = None
