"""The rounds of evaluation in a run directory, each of one weight version. They are how trainer and
evaluating processes know of each other, and outlive both.

RUN/evaluation/
    prompts.msgpack       the held-out prompts, tokenised
    version_N.safetensors the weights of a round that is still to be carried out
    version_N.jsonl       its responses, to be read (`asyncrl samples FILE`)
    results.jsonl         `Result`: a line for each round that is done
    trained               there while all training steps are done
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from asyncrl.config import CheckpointConfig
from asyncrl.paths import Under, replace_file
from asyncrl.runfiles.checkpoints import Checkpoint, Checkpoints
from asyncrl.runfiles.layout import RunDir
from asyncrl.weights.source import WeightsError

if TYPE_CHECKING:
    from torch import Tensor

HASH, NAMES = "hash", "names"
"""What is told of weights in their file: of all together, and their names in the order in which they are
published, which is not that of the file."""
_DAMAGED = ".damaged"
_UNFINISHED = ".unfinished"


class Result(msgspec.Struct, frozen=True):
    """What came of a round."""

    version: int
    metrics: dict[str, float]
    """By their names in `metrics.jsonl`."""
    seconds: float
    """That it took."""
    generate_s: float = 0.0
    """Of these, the seconds in which the engine had requests."""

    def told(self) -> dict[str, float]:
        """Its metrics with what it took, by their names in `metrics.jsonl`."""
        share = {"eval/generate_frac": self.generate_s / self.seconds} if self.seconds else {}
        took = {"eval/seconds": self.seconds, "eval/generate_s": self.generate_s}
        return {"eval/version": self.version, **took, **share, **self.metrics}


class KeptWeights:
    """A `WeightSource` of what was kept for a round."""

    canary = None

    def __init__(self, version: int, path: Path) -> None:
        self.version = version
        self._path = path

    def tensors(self) -> Mapping[str, Tensor]:
        from safetensors import SafetensorError, safe_open

        from asyncrl.weights.hashes import hash_weights

        try:
            with safe_open(self._path, "pt") as file:
                about = file.metadata()
                tensors = {name: file.get_tensor(name) for name in msgspec.json.decode(about[NAMES])}
        except (OSError, SafetensorError) as error:
            raise WeightsError(f"{self._path} cannot be read: {error}") from None
        if hash_weights(tensors, tensors.__getitem__) != about[HASH]:
            raise WeightsError(f"{self._path} is damaged: its checksum does not match")
        return tensors


@dataclass(frozen=True, slots=True)
class Rounds:
    """Those of a run. A round is there once its weights are, and done once its result is: whoever dies in
    between leaves it to be carried out again."""

    path: Path

    prompts = Under("prompts.msgpack")
    results_file = Under("results.jsonl")
    trained = Under("trained")

    def keep(self, version: int, weights: Mapping[str, Tensor]) -> None:
        """Make a round of a version. weights: as they are published, on the CPU."""
        from safetensors.torch import save_file

        from asyncrl.weights.hashes import hash_weights

        self.path.mkdir(exist_ok=True)
        path = self._weights(version)
        unfinished = path.with_suffix(_UNFINISHED)
        about = {HASH: hash_weights(weights, weights.__getitem__)}
        save_file(dict(weights), unfinished, about | {NAMES: msgspec.json.encode(list(weights)).decode()})
        unfinished.replace(path)

    def pending(self) -> list[int]:
        """The versions that are still to be scored, oldest first."""
        found = (re.fullmatch(r"version_(\d+)\.safetensors", path.name) for path in self._files())
        return sorted(int(match[1]) for match in found if match)

    def source(self, version: int) -> KeptWeights:
        return KeptWeights(version, self._weights(version))

    def finish(self, result: Result, responses: bytes) -> None:
        """Of a pending round. responses: lines of `Sample`."""
        replace_file(self.responses(result.version), responses)
        with self.results_file.open("ab+") as file:
            if file.tell() and file.seek(-1, os.SEEK_END) and file.read() != b"\n":
                file.write(b"\n")  # a crash cut the last line short
            file.write(msgspec.json.encode(result) + b"\n")
            file.flush()
            os.fsync(file.fileno())
        self.forget(result.version)

    def forget(self, version: int) -> None:
        """The weights of a round that is done."""
        self._weights(version).unlink()

    def forget_after(self, version: int) -> None:
        """What there is of later versions: others will have their numbers."""
        kept = [result for result in self.results().values() if result.version <= version]
        if self.results_file.exists():
            replace_file(self.results_file, b"".join(msgspec.json.encode(one) + b"\n" for one in kept))
        for later in (each for each in self.pending() if each > version):
            self._weights(later).unlink()

    def set_aside(self, version: int) -> None:
        """Make no round of what cannot be read."""
        self._weights(version).replace(self._weights(version).with_suffix(_DAMAGED))

    def results(self) -> dict[int, Result]:
        """Of all that are done, by version in rising order."""
        try:
            lines = self.results_file.read_bytes().split(b"\n")
        except FileNotFoundError:
            return {}
        # A line that a crash cut short is of a round that is still pending.
        found = [r for line in lines if (r := _result(line)) is not None]
        return {result.version: result for result in sorted(found, key=lambda result: result.version)}

    @property
    def results_bytes(self) -> int:
        """What is written of them, to see that there is more."""
        return self.results_file.stat().st_size if self.results_file.exists() else 0

    def responses(self, version: int) -> Path:
        return self.path / f"version_{version}.jsonl"

    def is_known(self, version: int) -> bool:
        """Whether there is a round of it, or was."""
        path = self._weights(version)
        return path.exists() or path.with_suffix(_DAMAGED).exists() or version in self.results()

    def _weights(self, version: int) -> Path:
        return self.path / f"version_{version}.safetensors"

    def _files(self) -> list[Path]:
        return list(self.path.iterdir()) if self.path.is_dir() else []


def checkpoints_of(run_dir: RunDir, config: CheckpointConfig) -> Checkpoints:
    """A run's, which go by what `checkpoint.best_of` says of their versions."""
    metric, rounds = config.best_of, Rounds(run_dir.evaluation)
    if metric is None:
        return Checkpoints(run_dir.checkpoints, config.keep_last, config.keep_best)

    def value(checkpoint: Checkpoint) -> float:
        result = rounds.results().get(checkpoint.step)
        if result is not None:
            return result.metrics.get(metric, -math.inf)
        return math.inf if rounds.is_known(checkpoint.step) else -math.inf

    return Checkpoints(run_dir.checkpoints, config.keep_last, config.keep_best, value)


def _result(line: bytes) -> Result | None:
    try:
        return msgspec.json.decode(line, type=Result)
    except msgspec.DecodeError:
        return None
