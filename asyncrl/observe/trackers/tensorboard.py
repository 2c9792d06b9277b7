"""TensorBoard's event files, in `tensorboard/` of the run directory."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import HistogramProto, Summary
from tensorboard.compat.proto.tensor_pb2 import TensorProto
from tensorboard.compat.proto.tensor_shape_pb2 import TensorShapeProto
from tensorboard.compat.proto.types_pb2 import DT_STRING
from tensorboard.plugins.hparams.summary_v2 import hparams_pb
from tensorboard.plugins.text.metadata import create_summary_metadata
from tensorboard.summary.writer.event_file_writer import EventFileWriter

from asyncrl.observe.histogram import Histogram
from asyncrl.observe.metric_table import BOARD_NAME, board_tags
from asyncrl.observe.samples import printable
from asyncrl.observe.trackers.base import Step, TrackedRun
from asyncrl.observe.trackers.texts import as_markdown


class TensorBoard:
    """One event a step: an event for each number would take longer than some training steps."""

    def __init__(self, run: TrackedRun) -> None:
        self._run = run
        self._file: EventFileWriter | None = None

    def begin(self, after_step: int, last_step: int) -> None:
        self.close()
        self._file = EventFileWriter(str(self._run.folder / BOARD_NAME))
        if last_step:  # later points of earlier files are dropped
            start = SessionLog(status=SessionLog.START)
            self._add(Event(session_log=start, step=after_step + 1))
        if not after_step:
            self._add(Event(summary=hparams_pb(self._run.settings, self._run.id), step=0))

    def write(self, steps: Sequence[Step]) -> None:
        assert self._file is not None
        for step in steps:
            self._add(Event(summary=Summary(value=_values(step)), step=step.step))
            for scored in (*step.earlier, step.scalars):
                if "eval/version" in scored:
                    summary = Summary(value=_scored(scored))
                    self._add(Event(summary=summary, step=int(scored["eval/version"])))
        self._file.flush()

    def close(self) -> None:
        if self._file is not None:
            self._file.close()

    def _add(self, event: Event) -> None:
        assert self._file is not None
        event.wall_time = time.time()
        self._file.add_event(event)


def _values(step: Step) -> Iterator[Summary.Value]:
    for key, value in step.scalars.items():
        if not _is_scored(key):
            yield from (Summary.Value(tag=tag, simple_value=value) for tag in board_tags(key))
    for name, histogram in step.histograms.items():
        yield Summary.Value(tag=f"histograms/{name}", histo=_histogram(histogram))
    for sample in step.samples:
        yield _text(f"samples/{sample.chosen[0]}", as_markdown(sample))
    if step.warnings:
        yield _text("warnings", printable("\n\n".join(step.warnings)))


def _is_scored(key: str) -> bool:
    return key.startswith("eval/")


def _scored(scalars: Mapping[str, float]) -> Iterator[Summary.Value]:
    """What held-out prompts have given: it is of a version, which may be older than the step."""
    for key, value in scalars.items():
        if _is_scored(key):
            yield Summary.Value(tag=key, simple_value=value)


def _histogram(histogram: Histogram) -> HistogramProto:
    """Its buckets end at the edges; the first one has no start of its own, so an empty one precedes it."""
    counts, middles = histogram.counts, histogram.middles
    return HistogramProto(
        min=histogram.edges[0],
        max=histogram.edges[-1],
        num=sum(counts),
        sum=sum(n * at for n, at in zip(counts, middles, strict=True)),
        sum_squares=sum(n * at * at for n, at in zip(counts, middles, strict=True)),
        bucket_limit=histogram.edges,
        bucket=[0.0, *counts],
    )


def _text(tag: str, text: str) -> Summary.Value:
    tensor = TensorProto(
        dtype=DT_STRING, string_val=[text.encode()], tensor_shape=TensorShapeProto(dim=[{"size": 1}])
    )
    return Summary.Value(tag=tag, tensor=tensor, metadata=create_summary_metadata(tag, ""))
