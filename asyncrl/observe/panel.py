"""Draws a run on a terminal."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from rich.console import Console, Group, RenderableType
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from asyncrl.observe.progress import RunProgress
from asyncrl.observe.role_meter import in_words
from asyncrl.observe.sample_text import VERSION, Colours, as_text
from asyncrl.observe.samples import Sample, printable
from asyncrl.observe.sparkline import sparkline
from asyncrl.roles import REWARD, ROLLOUT, TRAINER
from asyncrl.units import duration, milliseconds, number, percent

LABEL_WIDTH, VALUE_WIDTH, NOTE_WIDTH = 12, 13, 22
FRAME_WIDTH = 10
"""Borders and padding of the panel, and gaps between the columns."""
MIN_CHART_WIDTH, MAX_CHART_WIDTH = 8, 72
PANEL_WIDTH = LABEL_WIDTH + VALUE_WIDTH + NOTE_WIDTH + FRAME_WIDTH + MAX_CHART_WIDTH
SPINNER = "⠋⠙⠹⠸⠼⠴⠦⠧⠇⠏"
SPINNER_HZ = 4
PROMPT_LINES = 3
"""Of a sample's prompt, its last ones."""


def run_panel(
    progress: RunProgress,
    events: Sequence[str],
    now_s: float,
    width: int,
    hint: str = "",
    *,
    is_short: bool = False,
) -> RenderableType:
    """The whole panel for a terminal of `width` columns, with `events` (one line of text each) at the
    bottom, and a `hint` in its frame. is_short: it leaves out where the time goes, for what is below it."""
    width = min(width, PANEL_WIDTH)
    parts: list[RenderableType] = [_progress_bar(progress, now_s), Text()]
    if progress.steps:
        parts += [_chart_table(progress, width), Text(), _ledger(progress)]
        parts += [] if is_short else _times(progress)
        if progress.scores:
            parts.append(_one_line("evaluation".ljust(LABEL_WIDTH), "dim").append(f" {progress.scores}", ""))
    status = list(_status(progress, now_s))
    if progress.steps and (status or events):
        parts.append(Text())
    parts += status
    parts += [_one_line(event, "yellow") for event in events]
    return Panel(
        Group(*parts),
        title=Text.assemble(("AsyncRL", "bold"), (f"  {progress.name}", "dim")),
        title_align="left",
        subtitle=Text(hint, "dim") if hint else None,
        subtitle_align="right",
        border_style="cyan",
        width=width,
    )


def sample_panel(sample: Sample, width: int, height: int) -> RenderableType:
    """A response and the end of its prompt, which has no more of the room, in so many lines at most."""
    inner, room = max(1, width - 4), max(1, height - 3)
    console = Console(width=inner)
    text = as_text(sample, Colours(VERSION))
    prompt_lines = len(Text(printable(sample.prompt).removesuffix("\n")).wrap(console, inner))
    lines = text.wrap(console, inner)[max(0, prompt_lines - min(PROMPT_LINES, room // 2)) :]
    facts = _one_line(printable(sample.facts()), "")
    title = Text(printable(sample.heading()), "bold")
    return Panel(
        Group(facts, *lines[:room]), title=title, title_align="left", border_style="dim", width=width
    )


def _progress_bar(progress: RunProgress, now_s: float) -> RenderableType:
    grid = Table.grid(padding=(0, 1), expand=True)
    grid.add_column(no_wrap=True)
    grid.add_column(ratio=1)
    grid.add_column(no_wrap=True, style="dim")
    times = f"{duration(now_s - progress.started_s)} elapsed"
    eta_s = progress.eta_s(now_s)
    if eta_s is not None and not progress.is_done:
        times += f", {duration(eta_s)} left"
    total = f"/{progress.total_steps:,}"
    grid.add_row(
        Text.assemble(("step ", "dim"), (f"{progress.steps:,}", "bold"), (total, "dim")),
        ProgressBar(total=progress.total_steps, completed=progress.steps, complete_style="cyan"),
        times,
    )
    return grid


@dataclass(frozen=True, slots=True)
class _Row:
    """A quantity: its name, its current value, the metric that is charted between two levels, and a note."""

    label: str
    value: str
    key: str
    low: float
    high: float
    color: str
    note: str


def _chart_table(progress: RunProgress, width: int) -> RenderableType:
    chart_width = min(MAX_CHART_WIDTH, width - LABEL_WIDTH - VALUE_WIDTH - NOTE_WIDTH - FRAME_WIDTH)
    grid = Table.grid(padding=(0, 1), expand=True)
    grid.add_column(width=LABEL_WIDTH, no_wrap=True, style="dim")
    grid.add_column(width=VALUE_WIDTH, no_wrap=True, justify="right", style="bold")
    if chart_width >= MIN_CHART_WIDTH:
        grid.add_column(width=chart_width + 2, no_wrap=True)
    grid.add_column(no_wrap=True, overflow="ellipsis", style="dim", ratio=1)
    for row in _rows(progress):
        cells: list[RenderableType] = [row.label, row.value, row.note]
        if chart_width >= MIN_CHART_WIDTH:
            chart = sparkline(progress.series[row.key], chart_width, row.low, row.high)
            cells.insert(2, Text(f" {chart}", row.color))
        grid.add_row(*cells)
    return grid


def _rows(progress: RunProgress) -> Iterator[_Row]:
    now = progress.number
    rewards = progress.series["reward/mean"]
    gain = "" if math.isnan(rewards[-1] - rewards[0]) else f"{rewards[-1] - rewards[0]:+.3f} since the start"
    yield _Row("reward", number(rewards[-1], 3), "reward/mean", *_extent(rewards), "green", gain)
    response = f"{number(now('response_tokens/mean'), 1)} tokens a response"
    for kind, note in (("generated", response), ("trained", f"ess {number(now('ess'), 2)}")):
        key = f"throughput/{kind}_tokens_per_s"
        yield _Row(kind, f"{number(now(key))} tok/s", key, 0, _extent(progress.series[key])[1], "blue", note)
    bound, oldest = progress.max_staleness, now("staleness/max")
    color = "red" if oldest > bound else "magenta"
    note = f"max {number(oldest)}, bound {bound}"
    yield _Row("staleness", number(now("staleness/mean"), 2), "staleness/mean", 0, max(bound, 1), color, note)
    for role, cost in ((TRAINER, "publish"), (ROLLOUT, "pause")):
        share = now(f"idle/{role}")
        color = "yellow" if share > 0.5 else "cyan"
        note = f"{cost} {milliseconds(now(f'weights/{cost}_s'))}"
        yield _Row(f"{role} idle", percent(share), f"idle/{role}", 0, 1, color, note)


def _ledger(progress: RunProgress) -> RenderableType:
    text = _one_line("groups".ljust(LABEL_WIDTH), "dim")
    for i, state in enumerate(("trained", "in_flight", "dropped", "failed")):
        count = progress.number(f"ledger/{state}_groups")
        text.append(", " if i else " ", "dim")
        text.append(number(count), "bold red" if state == "failed" and count else "bold")
        text.append(f" {state.replace('_', ' ')}", "dim")
    return text


def _times(progress: RunProgress) -> Iterator[RenderableType]:
    for kind, states in progress.times().items():
        if kind in (TRAINER, ROLLOUT, REWARD):
            yield _one_line(kind.ljust(LABEL_WIDTH), "dim").append(f" {in_words(states)}", "")


def _status(progress: RunProgress, now_s: float) -> Iterator[RenderableType]:
    """What the run is doing, if there is anything to say."""
    overdue_s = progress.overdue_s(now_s)
    if overdue_s is not None:
        quiet = f"no step has ended for {duration(overdue_s)}"
        yield _one_line(f"{quiet}: {progress.status}" if progress.status else quiet, "yellow")
    elif not progress.is_under_way and (progress.status or not progress.steps):
        frame = SPINNER[int(now_s * SPINNER_HZ) % len(SPINNER)]
        yield _one_line(f"{frame} {progress.status or 'starting'}", "cyan")


def _one_line(text: str, style: str) -> Text:
    line = Text(overflow="ellipsis", no_wrap=True)
    return line.append(text, style)


def _extent(values: Sequence[float]) -> tuple[float, float]:
    """Smallest and largest value that is not NaN."""
    known = [value for value in values if not math.isnan(value)]
    return (min(known), max(known)) if known else (0.0, 0.0)
