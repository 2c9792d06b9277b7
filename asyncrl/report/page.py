"""A report: one HTML file that needs no network, no script and nothing beside it."""

from __future__ import annotations

import math
import shlex
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from asyncrl.errors import ConfigError
from asyncrl.observe.metric_table import METRICS
from asyncrl.observe.role_meter import named
from asyncrl.observe.samples import Sample, printable, shortened
from asyncrl.observe.summary import rows, scores
from asyncrl.paths import replace_file
from asyncrl.report import charts
from asyncrl.report.run import RunRecord, read_run
from asyncrl.states import STATES, State
from asyncrl.units import duration, number, percent

NAME = "report.html"
FATES = ("trained", "masked", "dropped", "left_out", "failed", "in_flight")
"""Of tokens and groups; `ledger/FATE_tokens` and `ledger/FATE_groups` of the books, where they have it."""
SPENT = ("train", "wait", "publish", "checkpoint", "other")
"""What the trainer's time is spent on: `time/SPENT_s`, which add up to `time/step_s`."""
_LIKE: Sequence[Sequence[State]] = (
    *(("generate",), ("forward_backward",), ("optimizer",), ("prefill",), ("publish",)),
    *(("score", "serve"), ("checkpoint", "store"), ("swap",), ("evaluate",)),
)
COLOURS: Mapping[State, int] = {state: colour for colour, states in enumerate(_LIKE) for state in states}
"""Of the states in which a role works; the coordinator's (serve, store) share those of others' states."""
SAMPLED_STEPS = 3
"""Responses are shown of so many steps, from the first to the last."""
MOST_CHARACTERS = 6000
"""Of a prompt or a response; the middle of a longer one is left out."""
MOST_WARNINGS = 200


@dataclass(frozen=True, slots=True)
class Share:
    """A part of a whole. amount: in tokens or seconds; groups: None where it is not of groups."""

    name: str
    meaning: str
    amount: float
    share: float
    groups: float | None = None


def write_report(run_dirs: str | Path | Sequence[str | Path], path: str | Path | None = None) -> Path:
    """Write the report of one run, or of several beside each other, and return its path: `report.html` in the
    run's directory, or in the current one for several. Raises `ConfigError` if a folder is no run's, or the
    file cannot be written, and `MetricsError` for a damaged line of metrics."""
    given = [run_dirs] if isinstance(run_dirs, str | Path) else run_dirs
    folders = [Path(folder) for folder in given]
    runs = [read_run(folder, name) for folder, name in zip(folders, names(folders), strict=True)]
    path = Path(path) if path else (runs[0].path / NAME if len(runs) == 1 else Path(NAME))
    html = render(runs, time.time())
    try:
        replace_file(path, html.encode())
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written ({error.strerror}); name another file") from None
    return path


def report_or_why_not(run_dir: Path) -> str:
    """Writes the report of a run that has ended, and says where. Nothing that is wrong with it makes a run
    fail."""
    try:
        return str(write_report(run_dir))
    except Exception as error:  # noqa: BLE001 - whatever it is, the run's end is what matters
        return f"none was written ({error}); to try again: asyncrl report {shlex.quote(str(run_dir))}"


def names(folders: Sequence[Path]) -> list[str]:
    """A name of each: the end of its path, of as many parts as tell them apart."""
    parts = [folder.absolute().parts for folder in folders]
    for n in range(1, max(map(len, parts), default=0) + 1):
        found = ["/".join(each[-n:]) for each in parts]
        if len({*found}) == len(found):
            return found
    return [f"{'/'.join(each[-1:])} ({i})" for i, each in enumerate(parts, 1)]


def render(runs: Sequence[RunRecord], now: float) -> str:
    """The page, at the time `now` in seconds since the epoch."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_shown,
    )
    environment.filters |= {"figure": figure, "percent": percent, "number": number, "state": named}
    environment.filters["middle_out"] = partial(shortened, most=MOST_CHARACTERS)
    return environment.get_template("page.html.jinja").render(
        runs=runs,
        written=time.strftime("%Y-%m-%d %H:%M", time.localtime(now)),
        states=[run.state(now) for run in runs],
        at_a_glance=_table([dict(_at_a_glance(run)) for run in runs]),
        settings=_table([run.settings for run in runs], "the default"),
        most_warnings=MOST_WARNINGS,
        overview=charts.overview(runs),
        evaluation=charts.by_version(runs),
        by_age=charts.by_age(runs),
        others=charts.others(runs),
        fates=[fates(run.books) for run in runs],
        reasons=[list(_reasons(run)) for run in runs],
        spent=[spent(run) for run in runs],
        colours=COLOURS,
        meanings=STATES,
        samples=[chosen(run.samples) for run in runs],
        duration=duration,
    )


def _at_a_glance(run: RunRecord) -> Iterator[tuple[str, str]]:
    if run.summary is not None:
        yield from rows(run.summary)
    for name, text in scores({result.version: result.metrics for result in run.evaluation}):
        yield f"score on {name}", text


def figure(value: float) -> str:
    """A number with four digits that count."""
    if not math.isfinite(value):
        return "-"
    return f"{value:,.0f}" if abs(value) >= 10_000 else f"{value:.4g}"


def fates(books: Mapping[str, float]) -> list[Share]:
    """Where every token went, as shares of what was sampled."""
    tokens = {fate: books.get(f"ledger/{fate}_tokens", 0.0) for fate in FATES}
    tokens["dropped"] -= tokens["left_out"]
    total = sum(tokens.values())
    meanings = {fate: METRICS[key].meaning for fate in FATES if (key := f"ledger/{fate}_tokens") in METRICS}
    meanings |= {
        "trained": "tokens trained on",
        "dropped": "tokens in dropped groups",
        "left_out": "tokens of responses that were not chosen for their group",
    }
    return [
        Share(
            fate.replace("_", " "),
            meanings[fate].removeprefix("of these, "),
            tokens[fate],
            tokens[fate] / total,
            books.get(f"ledger/{fate}_groups"),
        )
        for fate in FATES
        if total and (fate != "left_out" or tokens[fate])
    ]


def spent(run: RunRecord) -> list[Share]:
    """Where the trainer's time went, as shares of all steps."""
    sums = {what: float(np.nansum(run.columns.get(f"time/{what}_s", 0.0))) for what in SPENT}
    total = sum(sums.values())
    return [
        Share(what, METRICS[f"time/{what}_s"].meaning, seconds, seconds / total)
        for what, seconds in sums.items()
        if total
    ]


def chosen(samples: Sequence[Sample]) -> list[Sample]:
    """Best, worst and longest responses of the first, the middle and the last step that has some, the last
    first."""
    steps = sorted({sample.step for sample in samples})
    wanted = (
        {steps[i * (len(steps) - 1) // (SAMPLED_STEPS - 1)] for i in range(SAMPLED_STEPS)} if steps else {}
    )
    found = [s for s in samples if s.step in wanted and {"best", "worst", "longest"} & {*s.chosen}]
    return sorted(found, key=lambda sample: -sample.step)


def _reasons(run: RunRecord) -> Iterator[tuple[str, str, float]]:
    """(fate, reason, groups), the most frequent first."""
    dropped = "ledger/dropped/"
    found = [("dropped", k.removeprefix(dropped), n) for k, n in run.books.items() if k.startswith(dropped)]
    found += [("failed", reason, n) for reason, n in run.failures.items()]
    yield from sorted(found, key=lambda each: -each[2])


def _table(columns: Sequence[Mapping[str, str]], missing: str = "") -> list[tuple[str, list[str]]]:
    """Rows of all keys, each with its text in every column."""
    keys = dict.fromkeys(key for column in columns for key in column)
    return [(key, [column.get(key, missing) for column in columns]) for key in keys]


def _shown(value: object) -> object:
    """What a template writes: texts of runs hold whatever a model or a path held."""
    return printable(value) if isinstance(value, str) and not isinstance(value, Markup) else value
