"""Snapshots of several ranks: each keeps a share of the state, and writes it beside the training.

The training's collectives belong to the threads that train. Those that write find each other in a store: rank
0's says where, and then waits until every other one has said that its files are whole, or why not.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist

from asyncrl.errors import AsyncRLError
from asyncrl.trainer.state import HeldState
from asyncrl.waits import waiting

WRITE_TIMEOUT_S = 1800.0
"""Longest wait for the writing of another rank; one that dies ends them all before."""
_VOID = "void"
"""In place of a folder: there will be none."""


class SnapshotError(AsyncRLError, RuntimeError):
    """A rank has not written its share of a snapshot; the message says which, and why."""


class RankSnapshots:
    """The snapshots of one rank. All ranks call `take` together.

    hold: makes this rank's share, together with the others. store: the same for all ranks, and empty.
    """

    def __init__(self, hold: Callable[[], HeldState], store: dist.Store, rank: int, ranks: int) -> None:
        self._hold = hold
        self._store = store
        self._rank, self._ranks = rank, ranks
        self._number = 0
        self._writing: threading.Thread | None = None

    def take(self) -> SharedState:
        """Rank 0's, to be written before it takes the next one, or never."""
        self._finish_last()
        self._number += 1
        return SharedState(self._hold(), self._store, self._number, self._ranks)

    def follow(self) -> None:
        """On every other rank: take one, and write its share when rank 0 writes its own."""
        self._finish_last()
        self._number += 1
        # A daemon: the end of a run does not wait for what nobody will say any more.
        self._writing = threading.Thread(
            target=_write_share,
            args=(self._hold(), self._store, self._number, self._rank),
            name="snapshot",
            daemon=True,
        )
        self._writing.start()

    def close(self) -> None:
        self._finish_last()

    def _finish_last(self) -> None:
        """What is not written by now will not be."""
        if self._rank == 0 and self._number and not self._store.check([_folder_key(self._number)]):
            self._store.set(_folder_key(self._number), _VOID)
        if self._writing is not None:
            with waiting("this rank's share of the last snapshot to be written"):
                self._writing.join(WRITE_TIMEOUT_S)
            if self._writing.is_alive():
                raise SnapshotError(
                    f"rank {self._rank} has not written its share of the last snapshot within "
                    f"{WRITE_TIMEOUT_S:.0f} s"
                )
            self._writing = None


class SharedState:
    """Rank 0's share of a snapshot, and by way of the store the others'."""

    def __init__(self, held: HeldState, store: dist.Store, number: int, ranks: int) -> None:
        self.policy = held.policy
        self._held = held
        self._store = store
        self._number = number
        self._ranks = ranks

    def write(self, folder: Path) -> None:
        """Once. Returns when all ranks' files are whole; raises `SnapshotError` when one's will never be."""
        if self._store.check([_folder_key(self._number)]):
            raise SnapshotError(
                "a snapshot of several ranks is written once, and before the next one is taken"
            )
        self._store.set(_folder_key(self._number), str(folder.absolute()))
        self._held.write(folder)
        for rank in range(1, self._ranks):
            what = f"rank {rank} to write its share of {folder}"
            if problem := _await(self._store, _result_key(self._number, rank), what):
                raise SnapshotError(f"rank {rank} has not written its share of {folder}: {problem}")


def _write_share(held: HeldState, store: dist.Store, number: int, rank: int) -> None:
    """Writes when rank 0 says where, and says how it went."""
    problem = ""
    try:
        folder = _await(store, _folder_key(number), "rank 0 to write a snapshot")
        if folder != _VOID:
            held.write(Path(folder))
    except Exception as error:  # noqa: BLE001 - rank 0 hears of it, which this thread's end would hide
        problem = f"{type(error).__name__}: {error}"
    store.set(_result_key(number, rank), problem)


def _await(store: dist.Store, key: str, what: str) -> str:
    with waiting(what):
        try:
            store.wait([key], timedelta(seconds=WRITE_TIMEOUT_S))
        except RuntimeError:  # a file store says so of a timeout
            raise SnapshotError(f"waited {WRITE_TIMEOUT_S:.0f} s for {what}") from None
    return store.get(key).decode()


def _folder_key(number: int) -> str:
    return f"{number}/folder"


def _result_key(number: int, rank: int) -> str:
    return f"{number}/rank-{rank}"
