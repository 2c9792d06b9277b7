"""Weights & Biases, and trackio, which has the same functions. Where and how each is used is said by its own
environment variables, such as `WANDB_MODE`, `WANDB_ENTITY`, `TRACKIO_SPACE_ID` and `TRACKIO_DIR`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from asyncrl.observe.metric_table import board_tags
from asyncrl.observe.trackers.base import Step, TrackedRun
from asyncrl.observe.trackers.texts import SAMPLE_COLUMNS, sample_row


class Service:
    """A history that only grows: steps that a run repeats keep what was written first, but the last one,
    which may get more.

    library: what has `Histogram` and `Table`. run: what was started there.
    """

    def __init__(self, library: Any, run: Any) -> None:
        self._library = library
        self._run = run
        self._last_step = 0

    def begin(self, after_step: int, last_step: int) -> None:
        self._last_step = last_step

    def write(self, steps: Sequence[Step]) -> None:
        for step in steps:
            if step.step >= self._last_step:
                self._run.log(dict(self._values(step)), step=step.step)

    def close(self) -> None:
        self._run.finish()

    def _values(self, step: Step) -> Iterator[tuple[str, Any]]:
        for key, value in step.scalars.items():
            yield from ((tag, value) for tag in board_tags(key))
        for name, histogram in step.histograms.items():
            pair = list(histogram.counts), list(histogram.edges)
            yield f"histograms/{name}", self._library.Histogram(np_histogram=pair)
        table = self._library.Table
        if step.samples:
            rows = [sample_row(sample) for sample in step.samples]
            yield "samples", table(columns=list(SAMPLE_COLUMNS), data=rows)
        if step.earlier:  # there is a step for one round alone
            rounds = [*step.earlier, step.scalars]
            names = sorted({name for scored in rounds for name in scored if name.startswith("eval/")})
            yield "late_rounds", table(columns=names, data=[[*map(scored.get, names)] for scored in rounds])
        if step.warnings:
            yield "warnings", table(columns=["warning"], data=[[warning] for warning in step.warnings])


class WeightsAndBiases(Service):
    def __init__(self, run: TrackedRun) -> None:
        import wandb

        # What there is to see of the machine and the console is in the run directory.
        settings = wandb.Settings(console="off", silent=True, x_disable_stats=True)
        started = wandb.init(
            project=run.project,
            name=run.name,
            id=run.id,
            resume="allow",
            config=run.settings,
            dir=run.path,
            settings=settings,
        )
        super().__init__(wandb, started)


class Trackio(Service):
    def __init__(self, run: TrackedRun) -> None:
        import trackio

        # Runs are known by their names there.
        started = trackio.init(
            run.project,
            name=f"{run.name}-{run.id}",
            config=run.settings,
            resume="allow",
            auto_log_cpu=False,
            auto_log_gpu=False,
        )
        super().__init__(trackio, started)
