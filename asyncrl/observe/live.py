"""Shows a run while it goes on: a live panel on a terminal, plain lines elsewhere.

It only reads the tail of `metrics.jsonl`, so it runs in the supervisor and does not depend on the trainer.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import ParamSpec, Protocol

from rich.console import Console
from rich.live import Live

from asyncrl.observe.metrics import FILE_NAME, MetricsTail
from asyncrl.observe.panel import run_panel
from asyncrl.observe.progress import RunProgress
from asyncrl.units import duration, number, percent

P = ParamSpec("P")

REFRESH_S = 0.25
SHOWN_EVENTS = 4
PLAIN_STEPS = 25
"""Without a terminal, about this many lines report the steps of a run."""
PLAIN_STATUS_S = 5.0
"""Without a terminal, a changing status is reported at most this often."""


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
    away (a closed pipe, a lost terminal), it falls silent: watching a run never ends it.

    console: the output; standard output by default. now_s: a monotonic clock.
    """

    def __init__(
        self,
        run_dir: str | Path,
        total_steps: int,
        max_staleness: int,
        console: Console | None = None,
        now_s: Callable[[], float] = time.monotonic,
    ) -> None:
        console = console or Console()
        self._encoding = console.encoding
        self._now_s = now_s
        self._tail = MetricsTail(Path(run_dir) / FILE_NAME)
        self._progress = RunProgress(self._printable(Path(run_dir).name), total_steps, max_staleness, now_s())
        self._view: _View = (ScreenView if _is_screen(console) else LinesView)(console, self._progress)
        self._silent = False

    def start(self) -> None:
        """Start. Metrics that the run wrote before it was resumed are not shown again."""
        self._progress.started_s = self._now_s()
        for line in self._tail.poll():
            self._progress.add(line, self._progress.started_s)
        self._progress.begun_with = self._progress.steps
        self._show(self._view.start)

    def poll(self, status: str = "") -> None:
        """Show what is new. Cheap; to be called a few times per second.

        status: what the run is doing or waiting for, in a few words.
        """
        now_s = self._now_s()
        self._progress.status = self._printable(status)
        for line in self._tail.poll():
            self._progress.add(line, now_s)
            self._show(self._view.step, now_s)
            for warning in line.get("warnings", ()):
                self.event(warning)
        self._show(self._view.tick, now_s)

    def event(self, text: str) -> None:
        """Show something that happened, such as a worker's restart."""
        self._show(self._view.event, self._printable(text), self._now_s())

    def stop(self) -> None:
        """Show the final state, and leave it on the screen."""
        self.poll()
        self._show(self._view.stop, self._now_s())

    def _show(self, action: Callable[P, None], *args: P.args, **kwargs: P.kwargs) -> None:
        if self._silent:
            return
        try:
            action(*args, **kwargs)
        except OSError:
            self._silent = True

    def _printable(self, text: str) -> str:
        """External text on one line, without control characters, and within the output's encoding."""
        text = "".join(c if c.isprintable() else " " for c in text)
        return text.encode(self._encoding, "replace").decode(self._encoding)


class ScreenView:
    """A panel that redraws itself in place."""

    def __init__(self, console: Console, progress: RunProgress) -> None:
        self._console = console
        self._progress = progress
        self._events: deque[str] = deque(maxlen=SHOWN_EVENTS)
        self._live = Live(console=console, auto_refresh=False)
        self._drawn_s = -math.inf

    def start(self) -> None:
        self._live.start()
        self._draw(self._progress.started_s)

    def step(self, now_s: float) -> None:
        pass  # the next tick draws it

    def event(self, text: str, now_s: float) -> None:
        self._events.append(f"{duration(now_s - self._progress.started_s)}  {text}")

    def tick(self, now_s: float) -> None:
        if now_s - self._drawn_s >= REFRESH_S:
            self._draw(now_s)

    def stop(self, now_s: float) -> None:
        self._draw(now_s)
        self._live.stop()

    def _draw(self, now_s: float) -> None:
        self._drawn_s = now_s
        panel = run_panel(self._progress, self._events, now_s, self._console.width)
        self._live.update(panel, refresh=True)


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
        eta_s = p.eta_s(now_s)
        left = f", {duration(eta_s)} left" if eta_s else ""
        digits = len(str(p.total_steps))
        self._tell(
            f"step {p.steps:{digits}}/{p.total_steps}"
            f"  reward {number(p.number('reward/mean'), 3)}"
            f"  staleness {number(p.number('staleness/mean'), 2)} (max {number(p.number('staleness/max'))})"
            f"  tok/s {number(p.number('throughput/generated_tokens_per_s'))} generated"
            f" {number(p.number('throughput/trained_tokens_per_s'))} trained"
            f"  idle {percent(p.number('idle/trainer'))} trainer {percent(p.number('idle/rollout'))} rollout"
            f"  {duration(now_s - p.started_s)}{left}"
        )

    def _tell(self, text: str) -> None:
        print(text, file=self._file, flush=True)


def _is_screen(console: Console) -> bool:
    """Whether a panel can be redrawn there. Forced colours (FORCE_COLOR in a CI job) do not make a terminal,
    and the encoding must have the panel's characters."""
    return console.file.isatty() and not console.is_dumb_terminal and console.encoding.startswith("utf")
