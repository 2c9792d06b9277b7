"""Writes down what there is to say of each training step."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from asyncrl.core.records import Batch
from asyncrl.observe.histogram import Histogram
from asyncrl.observe.metrics import MetricsWriter
from asyncrl.observe.samples import SamplesWriter


class StepWriter(AbstractContextManager["StepWriter"]):
    """Appends to `metrics.jsonl` and `samples.jsonl` in the run directory.

    decode: from token ids to text, including special tokens; None where nothing is computed, and so nobody
    has written anything. after_step: as of `MetricsWriter`.
    """

    def __init__(
        self, run_dir: Path, decode: Callable[[Sequence[int]], str] | None, after_step: int = 0
    ) -> None:
        self._metrics = MetricsWriter(run_dir, after_step)
        self.last_wall_s = self._metrics.last_wall_s
        self._samples = None if decode is None else SamplesWriter(run_dir, decode, after_step)

    def write(self, batch: Batch, line: Mapping[str, Any]) -> None:
        """A step that has ended: what it was trained on, and its numbers."""
        if self._samples is not None:
            self._samples.write(batch)
            line = line | dict(_histograms(batch))
        # Last: who sees the line finds the samples.
        self._metrics.write(line)

    def amend(self, more: Mapping[str, Any]) -> None:
        """As of `MetricsWriter`."""
        self._metrics.amend(more)

    def __exit__(self, *_: object) -> None:
        self._metrics.close()
        if self._samples is not None:
            self._samples.close()


def _histograms(batch: Batch) -> Iterator[tuple[str, Histogram]]:
    members = [member for group in batch.groups for member in group.members()]
    columns = {
        "reward": [first.reward for first, *_ in members],
        "response_tokens": [sum(t.sampled_tokens for t in member) for member in members],
    }
    for name, values in columns.items():
        if (histogram := Histogram.of(values)) is not None:
            yield f"{name}/histogram", histogram
