"""A run's checkpoints: each complete or absent, verified when it is loaded, the oldest removed.

RUN/checkpoints/step_N/
    hf/            the model, for `AutoModelForCausalLM.from_pretrained`
    adapter/       instead, of a run with `trainer.lora`: the adapter, for `PeftModel.from_pretrained`; hf/ is
                   made of it where something needs it (`runfiles.merged`)
    training/      what the trainer needs to continue (`trainer.backend.Snapshot`)
    ledger.db      the ledger at that time
    state.json     `CheckpointState`
    manifest.json  size and checksum of every file above: written last
"""

from __future__ import annotations

import logging
import math
import os
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

import msgspec
import numpy as np

from asyncrl.errors import AsyncRLError
from asyncrl.paths import Under
from asyncrl.weights import blocks

log = logging.getLogger(__name__)

UNFINISHED = ".unfinished"
DAMAGED = ".damaged"


class CheckpointError(AsyncRLError):
    """A checkpoint is damaged or missing; the message says which one, and how."""


class CheckpointState(msgspec.Struct, frozen=True):
    """What a checkpoint holds besides the trainer's state and the ledger."""

    step: int
    """Finished training steps, which is the policy version."""
    reward: float | None
    """Mean reward of the step's batch; None if it is not a number."""
    weights_hash: str
    """Hash of the policy's weights."""
    reward_statistics: dict[str, dict[str, float]] = {}
    """`reward.statistics.RewardScaler.state`."""


class _File(msgspec.Struct, frozen=True):
    n_bytes: int
    digest: str
    """Digest of the content (`weights.digest`): 64 bits in hexadecimal."""

    @classmethod
    def of(cls, path: Path, threads: int) -> Self:
        n_bytes = path.stat().st_size
        content = np.memmap(path, np.uint8, "r") if n_bytes else np.empty(0, np.uint8)
        [digest] = blocks.digests(content, [(0, n_bytes)], threads)
        return cls(n_bytes, f"{digest:016x}")


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checkpoint on disk."""

    path: Path

    hf = Under("hf")
    adapter = Under("adapter")
    ledger = Under("ledger.db")
    _manifest = Under("manifest.json")

    @property
    def model(self) -> Path:
        """For others to load: the whole model, or where there is none the adapter."""
        return self.hf if self.hf.is_dir() else self.adapter

    @property
    def step(self) -> int:
        return int(self.path.name.rpartition("_")[2])

    def state(self) -> CheckpointState:
        return msgspec.json.decode((self.path / "state.json").read_bytes(), type=CheckpointState)

    def verify(self, parts: Sequence[str] = ()) -> None:
        """Read everything, or only the files and folders in `parts`. Raises `CheckpointError` unless each
        byte is as it was written."""
        try:
            manifest = msgspec.json.decode(self._manifest.read_bytes(), type=dict[str, _File])
        except (OSError, msgspec.DecodeError) as error:
            raise CheckpointError(f"{self._manifest} cannot be read: {error}") from None
        if parts:
            manifest = {n: file for n, file in manifest.items() if n.partition("/")[0] in parts}
        found = {str(path.relative_to(self.path)) for path in _files(self.path)} - {self._manifest.name}
        if missing := sorted(manifest.keys() - found):
            raise CheckpointError(f"{self.path} lacks {', '.join(missing)}")
        threads = blocks.spare_threads()
        for name, file in manifest.items():
            try:
                is_as_written = _File.of(self.path / name, threads) == file
            except OSError as error:
                raise CheckpointError(f"{self.path / name} cannot be read: {error}") from None
            if not is_as_written:
                raise CheckpointError(f"{self.path / name} is damaged: its size or checksum does not match")

    def seal(self) -> None:
        """Write the manifest, and flush everything to the disk, readable for whoever may read the folder.

        (safetensors creates files that only their owner may read, whatever the umask; the folder obeys it.)
        """
        mode = self.path.stat().st_mode & 0o666
        for path in _files(self.path):
            path.chmod(mode)
        threads = blocks.spare_threads()
        manifest = {
            str(path.relative_to(self.path)): _File.of(path, threads) for path in sorted(_files(self.path))
        }
        self._manifest.write_bytes(msgspec.json.format(msgspec.json.encode(manifest)))
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(_sync, _files(self.path)))
        for path in [*(p for p in self.path.rglob("*") if p.is_dir()), self.path]:
            _sync(path)


@dataclass(slots=True)
class Checkpoints:
    """The checkpoints of a run, in its folder `checkpoints`."""

    folder: Path
    keep_last: int = 1
    keep_best: int = 0
    value: Callable[[Checkpoint], float] = field(default=lambda checkpoint: _reward(checkpoint))
    """By which the best are found. Infinite: it will be known later, and the checkpoint is kept till then."""

    def all(self) -> list[Checkpoint]:
        """Latest first. Each was complete when it was written."""
        found = [p for p in self.folder.glob("step_*") if re.fullmatch(r"step_\d+", p.name) and p.is_dir()]
        return sorted(map(Checkpoint, found), key=lambda checkpoint: -checkpoint.step)

    def at(self, step: int) -> Checkpoint:
        """Raises `CheckpointError`."""
        for checkpoint in self.all():
            if checkpoint.step == step:
                return checkpoint
        there = ", ".join(str(c.step) for c in reversed(self.all())) or "none"
        raise CheckpointError(f"{self.folder} has no checkpoint of step {step}; there are: {there}")

    def newest_whole(self, parts: Sequence[str] = ()) -> Checkpoint | None:
        """The latest that is (or whose `parts` are) as it was written. Damaged ones are reported and left
        alone. None if there is none at all; raises `CheckpointError` if every one is damaged."""
        damaged = []
        for checkpoint in self.all():
            try:
                checkpoint.verify(parts)
            except CheckpointError as error:
                if not checkpoint.path.exists():  # its run goes on, and has removed it for a later one
                    return self.newest_whole(parts)
                log.warning("skipping this checkpoint: %s", error)
                damaged.append(str(error))
            else:
                return checkpoint
        if damaged:
            raise CheckpointError(
                "every checkpoint is damaged; to start over, move them away:\n" + "\n".join(damaged)
            )
        return None

    def write(self, state: CheckpointState, fill: Callable[[Path], None]) -> Checkpoint:
        """Add a checkpoint: `fill` writes to a temporary folder, which is renamed once it is complete and on
        the disk. Then checkpoints that need not be kept are removed."""
        path = self.folder / f"step_{state.step}"
        unfinished = Checkpoint(path.with_name(path.name + UNFINISHED))
        for leftover in self.folder.glob(f"*{UNFINISHED}"):
            shutil.rmtree(leftover)
        unfinished.path.mkdir(parents=True)
        fill(unfinished.path)
        (unfinished.path / "state.json").write_bytes(msgspec.json.encode(state))
        unfinished.seal()
        if path.exists():  # of a step that was trained again
            shutil.rmtree(path)
        unfinished.path.rename(path)
        self._set_aside_after(state.step)
        _sync(self.folder)
        self.rotate()
        return Checkpoint(path)

    @property
    def oldest_to_begin_with(self) -> int:
        """Step of the oldest checkpoint that a run may have to go back to if all later ones are damaged; 0
        while there are fewer than should be kept: then it may have to start over."""
        latest = self.all()[: self.keep_last]
        return latest[-1].step if len(latest) == self.keep_last else 0

    def _set_aside_after(self, step: int) -> None:
        """A run that writes this step has resumed from before it, so later checkpoints must have been
        damaged."""
        for later in (checkpoint for checkpoint in self.all() if checkpoint.step > step):
            aside = later.path.with_name(f"{later.path.name}{DAMAGED}")
            if aside.exists():
                shutil.rmtree(aside)
            later.path.rename(aside)
            log.warning("%s was damaged and is now %s", later.path, aside)

    def rotate(self) -> None:
        """Remove what need not be kept."""
        older, best = self.all()[self.keep_last :], []
        if self.keep_best:
            values = {checkpoint: self.value(checkpoint) for checkpoint in older}
            open_ones = [*values.values()].count(math.inf)
            best = sorted(older, key=lambda c: (-values[c], -c.step))[: self.keep_best + open_ones]
        for checkpoint in older:
            if checkpoint not in best:
                # Renamed first: a half-removed checkpoint must not look like one.
                doomed = checkpoint.path.with_name(checkpoint.path.name + UNFINISHED)
                checkpoint.path.rename(doomed)
                shutil.rmtree(doomed)


def _reward(checkpoint: Checkpoint) -> float:
    """The reward; minus infinity if it is unknown or the checkpoint is damaged."""
    try:
        reward = checkpoint.state().reward
    except (OSError, msgspec.DecodeError):
        reward = None
    return -float("inf") if reward is None else reward


def _files(folder: Path) -> Iterator[Path]:
    return (path for path in folder.rglob("*") if path.is_file())


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
