"""How weight versions get from the trainer to the engines: both ends."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Protocol, cast

from asyncrl.resolve import resolve
from asyncrl.weights.canary import Canary
from asyncrl.weights.published import PublishedWeights
from asyncrl.weights.source import WeightSource


class Transport(Protocol):
    """Made in every process that needs it, with a name that only this run has and the run's own folder; each
    process uses one end. Every implementation passes `tests/conformance/test_transport.py`."""

    keeps: int
    """So many newest versions can be read: version v is published once every engine that can has taken
    version v - keeps."""

    def publish(self, version: int, weights: PublishedWeights, canary: Canary | None) -> bytes:
        """The trainer's end: put a version where the engines find it. Returns the notice that tells them.
        Blocking, one thread at a time; the weights do not change meanwhile. Raises `WeightsError` where there
        is no room."""

    def metrics(self) -> dict[str, float]:
        """The trainer's end: what there is to tell since the last call, by the names of metrics. Your own
        need not have it."""

    def close(self) -> None:
        """The trainer's end: take away what it has published. Engines that are reading finish undisturbed, or
        get a `WeightsError`."""

    def expect(self, notice: bytes) -> None:
        """An engine's end: begin to bring here what a notice tells of, which an engine that is being loaded
        will ask for. Waits for nothing. Your own need not have it."""

    def source(self, notice: bytes) -> WeightSource:
        """An engine's end: what a notice tells of, which is in force from now on. Waits for
        nothing."""

    def leave(self) -> None:
        """An engine's end: take away what it has put on its host. Your own need not have it."""

    def is_gone(self, notice: bytes) -> bool:
        """An engine's end: whether the version of a notice is gone with the trainer that published it, and
        the next trainer's is to come."""

    def sweep(self) -> None:
        """The launcher's: leave nothing behind, whatever has ended the trainer. Called before a run and after
        it."""

    @staticmethod
    def host_bytes(version_bytes: int) -> int:
        """Memory of the trainer's host that it takes for versions of this size, besides the processes'
        own."""

    @staticmethod
    def gpu_bytes(version_bytes: int) -> int:
        """The same of the trainer's GPU. Your own need not have it."""


TRANSPORTS = {
    "shm": "asyncrl.weights.shm.transport:SharedMemory",
    "ipc": "asyncrl.weights.ipc.transport:Ipc",
    "tcp": "asyncrl.transfer.transport:Tcp",
    "collective": "asyncrl.transfer.collective.transport:Collective",
}
"""By their names in `weights.transport`. All put something into the shared memory of the trainer's host."""


def find_transport(spec: str) -> Callable[[str, Path], Transport]:
    """One of `TRANSPORTS`, or the user's own. Raises `ConfigError` for one that cannot be imported."""
    return resolve(TRANSPORTS.get(spec, spec), what="weights.transport")


def transport_bytes(spec: str, version_bytes: int) -> int:
    """`host_bytes` of the transport that a config names."""
    return cast(Transport, find_transport(spec)).host_bytes(version_bytes)


def transport_gpu_bytes(spec: str, version_bytes: int) -> int:
    """The same of `gpu_bytes`."""
    return getattr(find_transport(spec), "gpu_bytes", lambda _: 0)(version_bytes)
