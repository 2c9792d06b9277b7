"""Shows a run while it goes on: a live panel on a terminal, plain lines elsewhere.

It only reads the tail of `metrics.jsonl`, so it runs in the supervisor and does not depend on the trainer.
"""

from __future__ import annotations

import logging
import math
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import ParamSpec, Protocol, TextIO

import msgspec
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.text import Text

from asyncrl.observe.keys import Keys
from asyncrl.observe.metrics import FILE_NAME, MetricsTail
from asyncrl.observe.notebook import NOTEBOOK_WIDTH, as_html, display_in_notebook
from asyncrl.observe.panel import PANEL_WIDTH, run_panel, sample_panel
from asyncrl.observe.progress import RunProgress, scores
from asyncrl.observe.samples import FILE_NAME as SAMPLES
from asyncrl.observe.samples import Sample
from asyncrl.observe.tail import LineTail
from asyncrl.units import duration, number, percent

log = logging.getLogger(__name__)

P = ParamSpec("P")

SHOWN_EVENTS = 4
SAMPLE_KEY = "s"
PLAIN_STEPS = 25
"""Without a terminal, about this many lines report the steps of a run."""
PLAIN_STATUS_S = 5.0
"""Without a terminal, a changing status is reported at most this often."""
SEEN_S = 1.0
"""A status that is no newer than this may be of before the step."""


class _Scored(msgspec.Struct):
    """As far as it is shown."""

    version: int
    metrics: dict[str, float]


class _View(Protocol):
    """A way to show a run."""

    def start(self) -> None: ...

    def step(self, now_s: float) -> None:
        """The progress has a new line."""

    def event(self, text: str, now_s: float) -> None: ...

    def tick(self, now_s: float) -> None:
        """Time has passed; the status may have changed."""

    def stop(self, now_s: float) -> None: ...


class LiveView:
    """Shows a run until it ends.

    Besides numbers it shows the `warnings` of the metrics (a list of strings) and events. If the output goes
    away (a closed pipe, a lost terminal), or cannot be drawn, it falls silent: watching a run never ends it.

    console: the output; standard output, or the cell of a notebook, by default. now_s: a monotonic clock.
    keys: the terminal whose keys it reads; standard input by default. results: where a line tells of each
    evaluated version (`asyncrl.runfiles.evaluation.Result`).
    """

    def __init__(
        self,
        run_dir: str | Path,
        total_steps: int,
        max_staleness: int,
        console: Console | None = None,
        now_s: Callable[[], float] = time.monotonic,
        keys: TextIO | None = None,
        results: Path | None = None,
    ) -> None:
        notebook = display_in_notebook() if console is None else None
        console = console or Console()
        self._encoding = console.encoding
        self._now_s = now_s
        self._tail = MetricsTail(Path(run_dir) / FILE_NAME)
        self._results = None if results is None else LineTail(results)
        self._progress = RunProgress(self._printable(Path(run_dir).name), total_steps, max_staleness, now_s())
        self._view: _View
        if notebook is not None:
            self._view = NotebookView(notebook, self._progress)
        elif _is_screen(console):
            self._view = ScreenView(console, self._progress, Path(run_dir), Keys(keys))
        else:
            self._view = LinesView(console, self._progress)
        self._silent = False

    def start(self) -> None:
        """Start. Metrics that the run wrote before it was resumed are not shown again."""
        self._progress.started_s = self._now_s()
        self._read_scores()
        for line in self._tail.poll():
            self._progress.add(line, self._progress.started_s)
        self._progress.begun_with = self._progress.steps
        self._show(self._view.start)

    def poll(self, status: str = "") -> None:
        """Show what is new. Cheap; to be called a few times per second.

        status: what the run is doing or waiting for, in a few words.
        """
        self._show(self._look, status)

    def event(self, text: str) -> None:
        """Show something that happened, such as a worker's restart."""
        self._show(self._view.event, self._printable(text), self._now_s())

    def stop(self) -> None:
        """Show the final state, and leave it on the screen."""
        self.poll()
        with suppress(Exception):  # a terminal gets its modes back, even one that has not taken all
            self._view.stop(self._now_s())

    def _look(self, status: str) -> None:
        now_s = self._now_s()
        self._progress.status = self._printable(status)
        self._read_scores()
        for line in self._tail.poll():
            self._progress.add(line, now_s)
            self._view.step(now_s)
            for warning in line.get("warnings", ()):
                self.event(warning)
        self._view.tick(now_s)

    def _read_scores(self) -> None:
        for line in () if self._results is None else self._results.poll():
            with suppress(msgspec.DecodeError):  # what a crash cut short
                found = msgspec.json.decode(line, type=_Scored)
                self._progress.scores = self._printable(scores(found.version, found.metrics))

    def _show(self, action: Callable[P, None], *args: P.args, **kwargs: P.kwargs) -> None:
        if self._silent:
            return
        try:
            action(*args, **kwargs)
        except OSError:
            self._silent = True
        except Exception:
            self._silent = True
            log.exception("the run goes on, but is shown no more")

    def _printable(self, text: str) -> str:
        """External text on one line, without control characters, and within the output's encoding."""
        text = "".join(c if c.isprintable() else " " for c in text)
        return text.encode(self._encoding, "replace").decode(self._encoding)


class PanelView:
    """A panel that is drawn again and again."""

    refresh_s = 0.25

    def __init__(self, progress: RunProgress) -> None:
        self._progress = progress
        self._events: deque[str] = deque(maxlen=SHOWN_EVENTS)
        self._drawn_s = -math.inf

    def start(self) -> None:
        self._draw(self._progress.started_s)

    def step(self, now_s: float) -> None:
        pass  # the next tick draws it

    def event(self, text: str, now_s: float) -> None:
        self._events.append(f"{duration(now_s - self._progress.started_s)}  {text}")

    def tick(self, now_s: float) -> None:
        if now_s - self._drawn_s >= self.refresh_s:
            self._draw(now_s)

    def stop(self, now_s: float) -> None:
        self._draw(now_s)

    def _draw(self, now_s: float) -> None:
        self._drawn_s = now_s
        self._put(now_s)

    def _put(self, now_s: float) -> None:
        raise NotImplementedError


class ScreenView(PanelView):
    """On a terminal, redrawn in place. By a key the last sample is shown below."""

    def __init__(self, console: Console, progress: RunProgress, run_dir: Path, keys: Keys) -> None:
        super().__init__(progress)
        self._console = console
        self._keys = keys
        self._samples = LineTail(run_dir / SAMPLES)
        self._last_sample: bytes | None = None
        self._shows_sample = False
        self._hint = f"{SAMPLE_KEY}: the last sample"
        self._live = Live(console=console, auto_refresh=False)

    def start(self) -> None:
        self._keys.__enter__()
        self._live.start()
        super().start()

    def tick(self, now_s: float) -> None:
        while (key := self._keys.poll()) is not None:
            if key == SAMPLE_KEY:
                self._shows_sample = not self._shows_sample
                self._drawn_s = -math.inf
        super().tick(now_s)

    def stop(self, now_s: float) -> None:
        self._shows_sample, self._hint = False, ""
        try:
            super().stop(now_s)
            self._live.stop()
        finally:
            self._keys.__exit__()

    def _put(self, now_s: float) -> None:
        width, height = self._console.size
        events = [*self._events][-1:] if self._shows_sample else self._events  # a sample needs the room
        panel = run_panel(self._progress, events, now_s, width, self._hint, is_short=self._shows_sample)
        if self._shows_sample:
            used = len(self._console.render_lines(panel, pad=False))
            self._live.update(Group(panel, self._sample_panel(min(width, PANEL_WIDTH), height - used - 1)))
        else:
            self._live.update(panel)
        self._live.refresh()

    def _sample_panel(self, width: int, height: int) -> RenderableType:
        if lines := self._samples.poll():
            self._last_sample = lines[-1]
        if self._last_sample is None:
            return Text("no sample is kept yet", "dim")
        return sample_panel(msgspec.json.decode(self._last_sample, type=Sample), width, height)


class NotebookView(PanelView):
    """In the output of a notebook's cell, replaced in place."""

    refresh_s = 1.0

    def __init__(self, display: Callable[[str], Callable[[str], None]], progress: RunProgress) -> None:
        super().__init__(progress)
        self._display = display
        self._update: Callable[[str], None] | None = None

    def _put(self, now_s: float) -> None:
        html = as_html(run_panel(self._progress, self._events, now_s, NOTEBOOK_WIDTH), NOTEBOOK_WIDTH)
        if self._update is None:
            self._update = self._display(html)
        else:
            self._update(html)


class LinesView:
    """Plain lines without control characters: the first step, the last, and evenly spaced ones in between."""

    def __init__(self, console: Console, progress: RunProgress) -> None:
        self._file = console.file
        self._progress = progress
        self._told_step = 0
        self._told_status = ""
        self._told_status_s = -math.inf

    def start(self) -> None:
        p = self._progress
        self._tell(f"AsyncRL {p.name}: {p.total_steps:,} steps, staleness bound {p.max_staleness}")

    def step(self, now_s: float) -> None:
        every = -(-self._progress.total_steps // PLAIN_STEPS)
        if self._told_step == 0 or self._progress.steps % every == 0 or self._progress.is_done:
            self._tell_step(now_s)

    def event(self, text: str, now_s: float) -> None:
        self._tell(f"{duration(now_s - self._progress.started_s)}  {text}")

    def tick(self, now_s: float) -> None:
        p = self._progress
        if (
            p.status not in ("", self._told_status)
            and not p.is_under_way
            and now_s - self._told_status_s >= PLAIN_STATUS_S
        ):
            self._told_status, self._told_status_s = p.status, now_s
            self.event(p.status, now_s)

    def stop(self, now_s: float) -> None:
        if self._progress.steps > self._told_step:
            self._tell_step(now_s)

    def _tell_step(self, now_s: float) -> None:
        p = self._progress
        self._told_step = p.steps
        self._told_status_s = max(self._told_status_s, now_s - PLAIN_STATUS_S + SEEN_S)
        eta_s = p.eta_s(now_s)
        left = f", {duration(eta_s)} left" if eta_s else ""
        digits = len(str(p.total_steps))
        self._tell(
            f"step {p.steps:{digits}}/{p.total_steps}"
            f"  reward {number(p.number('reward/mean'), 3)}"
            f"  staleness {number(p.number('staleness/mean'), 2)} (max {number(p.number('staleness/max'))})"
            f"  tok/s {number(p.number('throughput/generated_tokens_per_s'))} generated"
            f" {number(p.number('throughput/trained_tokens_per_s'))} trained"
            f"{f'  evaluation {p.scores}' if p.scores else ''}"
            f"  idle {percent(p.number('idle/trainer'))} trainer {percent(p.number('idle/rollout'))} rollout"
            f"  {duration(now_s - p.started_s)}{left}"
        )

    def _tell(self, text: str) -> None:
        print(text, file=self._file, flush=True)


def _is_screen(console: Console) -> bool:
    """Whether a panel can be redrawn there. Forced colours (FORCE_COLOR in a CI job) do not make a terminal,
    and the encoding must have the panel's characters."""
    return console.file.isatty() and not console.is_dumb_terminal and console.encoding.startswith("utf")
