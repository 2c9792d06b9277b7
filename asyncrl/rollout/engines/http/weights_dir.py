"""The folder through which weight versions reach the servers: on a file system that worker and servers
share."""

from __future__ import annotations

import fcntl
import shutil
import uuid
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from asyncrl.errors import RunFailed
from asyncrl.weights.canary import Canary
from asyncrl.weights.source import WeightsError

if TYPE_CHECKING:
    from torch import Tensor

_PREFIX = "asyncrl-v"
_KEY = "rollout.http.weights_dir"


@dataclass(frozen=True, slots=True)
class Staged:
    """A weight version that servers can load."""

    version: int
    folder: Path
    canary: Canary | None


def sweep(path: Path) -> None:
    """Remove what a run has left in its folder, unless another one is using that by now."""
    if path.is_dir():
        with suppress(RunFailed):
            WeightsDir(path).close()


class WeightsDir:
    """Holds `path` against other runs until closed, and has in it the versions written and not dropped.

    Raises `RunFailed` where that cannot be. What a killed worker has left there goes.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            path.mkdir(parents=True, exist_ok=True)
            self._lock = (path / ".asyncrl.lock").open("w")
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RunFailed(f"{_KEY}={path}: another run is using this folder; name another one") from None
        except OSError as error:
            raise RunFailed(f"{_KEY}={path}: {error.strerror}; name another folder") from error
        self._sweep()

    def write(self, version: int, tensors: Mapping[str, Tensor]) -> Path:
        """Write a version as a folder of safetensors, whole or not at all. Blocking. Raises
        `WeightsError`."""
        from safetensors import SafetensorError
        from safetensors.torch import save_file

        # A name that never was: a server's file system may remember what another version of this number had.
        folder = self._path / f"{_PREFIX}{version}-{uuid.uuid4().hex[:8]}"
        try:
            folder.mkdir()
            file = folder / "model.safetensors"
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file)
            # The server may be another user's. Who must not read the weights is kept out by the folder they
            # are in.
            folder.chmod(0o755)
            file.chmod(0o644)
        except (OSError, SafetensorError) as error:
            self.drop(folder)
            raise WeightsError(
                f"weight version {version} cannot be written into {_KEY}={self._path}: {error}"
            ) from error
        return folder

    def drop(self, folder: Path) -> None:
        shutil.rmtree(folder, ignore_errors=True)

    def close(self) -> None:
        """May be called more than once."""
        if not self._lock.closed:
            self._sweep()
            self._lock.close()

    def _sweep(self) -> None:
        for folder in self._path.glob(f"{_PREFIX}*"):
            self.drop(folder)
