"""What a tracker is: a place outside the run's own files where people look at runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import msgspec

from asyncrl.observe.histogram import Histogram
from asyncrl.observe.samples import Sample


class TrackedRun(msgspec.Struct, frozen=True):
    """What a tracker is told of a run. id: letters and digits; the same however often the run goes on, and
    another run's is another. settings: those that differ from their defaults, by dotted key."""

    path: str
    name: str
    id: str
    project: str
    settings: dict[str, str | int | float | bool]

    @property
    def folder(self) -> Path:
        return Path(self.path)


@dataclass(frozen=True, slots=True)
class Step:
    """A finished training step. scalars: the finite numbers of its line in `metrics.jsonl`. earlier: those of
    each of its `earlier_rounds` (`evaluation.beside`)."""

    step: int
    scalars: Mapping[str, float]
    histograms: Mapping[str, Histogram] = field(default_factory=dict)
    samples: Sequence[Sample] = ()
    warnings: Sequence[str] = ()
    earlier: Sequence[Mapping[str, float]] = ()


class Tracker(Protocol):
    """Made with a `TrackedRun`, in a process that does nothing else: it may block, and what it raises ends
    that process and no other."""

    def begin(self, after_step: int, last_step: int) -> None:
        """The steps after `after_step` follow. Called once before the first `write`, and again where a run
        that went on from a checkpoint repeats steps: those up to `last_step` were written already, and are
        replaced if the tracker can do that."""

    def write(self, steps: Sequence[Step]) -> None:
        """Steps in their order. When it returns, they are where a later process need not bring them
        again."""

    def close(self) -> None:
        """No more steps for now: the run has ended, or been interrupted."""
