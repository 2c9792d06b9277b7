"""Summarises a finished run from its run directory."""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from asyncrl.observe.metric_table import BOARD_NAME, scored_set
from asyncrl.observe.metrics import FILE_NAME, MetricsError, read_metrics
from asyncrl.observe.role_meter import Times, by_kind, in_words, times
from asyncrl.roles import REWARD, ROLLOUT, TRAINER
from asyncrl.units import duration, format_bytes, number, percent

FIRST_STEPS, LAST_STEPS = 3, 5
"""The first and the last reward are means over this many steps."""
SHOWN_WARNINGS = 10


@dataclass(frozen=True, slots=True)
class Summary:
    """Means are over steps. Rates and idle shares are weighted by the durations of the steps, so they
    describe the whole run. Quantities that were never finite are NaN."""

    run_dir: Path
    steps: int
    wall_s: float
    reward_first: float
    reward_last: float
    generated_tokens_per_s: float
    trained_tokens_per_s: float
    staleness_mean: float
    staleness_max: float
    idle_trainer: float
    idle_rollout: float
    generated_groups: int
    trained_groups: int
    dropped_groups: int
    failed_groups: int
    in_flight_groups: int
    useful_frac: float
    """Share of the sampled tokens that were trained on, of those that came to an end."""
    times: Times
    """Where the time of every role went."""
    warnings: Sequence[tuple[int, str]]
    """What the metrics showed to be wrong, and at which step."""
    checkpoint_s: float
    """Time that the training waited for checkpoints."""
    checkpoints: int
    """Number of checkpoints kept."""
    checkpoint_bytes: int
    """Their size on disk."""
    checkpoint: Path | None
    """The newest model, for `AutoModelForCausalLM.from_pretrained`; None if none was saved."""

    @property
    def board_command(self) -> str:
        return f"tensorboard --logdir {shlex.quote(str(self.run_dir / BOARD_NAME))}"


def summarise(run_dir: str | Path) -> Summary:
    """Raises `FileNotFoundError` if there are no metrics, and `MetricsError` if no step was finished."""
    run_dir = Path(run_dir)
    lines = read_metrics(run_dir / FILE_NAME)
    if not lines:
        raise MetricsError(f"{run_dir / FILE_NAME} holds no finished training step; see {run_dir / 'logs'}")
    return summary_of(run_dir, lines)


def summary_of(run_dir: Path, lines: Sequence[Mapping[str, Any]]) -> Summary:
    """From lines of its metrics that were read already, at least one."""
    last = lines[-1]
    ends_s = [0.0, *(line["wall_s"] for line in lines)]
    durations_s = [max(0.0, end - start) for start, end in pairwise(ends_s)]

    def column(key: str) -> list[float]:
        return [line[key] for line in lines]

    def whole_run(key: str) -> float:
        return _mean(column(key), durations_s)

    kept = _checkpoints(run_dir)
    return Summary(
        run_dir=run_dir,
        steps=last["step"],
        wall_s=last["wall_s"],
        reward_first=_mean(column("reward/mean")[:FIRST_STEPS]),
        reward_last=_mean(column("reward/mean")[-LAST_STEPS:]),
        generated_tokens_per_s=whole_run("throughput/generated_tokens_per_s"),
        trained_tokens_per_s=whole_run("throughput/trained_tokens_per_s"),
        staleness_mean=_mean(column("staleness/mean")),
        staleness_max=max((v for v in column("staleness/max") if not math.isnan(v)), default=math.nan),
        idle_trainer=whole_run("idle/trainer"),
        idle_rollout=whole_run("idle/rollout"),
        generated_groups=last["ledger/generated_groups"],
        trained_groups=last["ledger/trained_groups"],
        dropped_groups=last["ledger/dropped_groups"],
        failed_groups=last["ledger/failed_groups"],
        in_flight_groups=last["ledger/in_flight_groups"],
        useful_frac=_useful(last),
        times=times(lines),
        warnings=[(line["step"], text) for line in lines for text in line.get("warnings") or ()],
        checkpoint_s=math.fsum(line.get("time/checkpoint_s", 0.0) for line in lines),
        checkpoints=len(kept),
        checkpoint_bytes=sum(f.stat().st_size for path in kept for f in path.rglob("*") if f.is_file()),
        checkpoint=newest_checkpoint(run_dir),
    )


def newest_checkpoint(run_dir: Path) -> Path | None:
    """The model of the latest whole checkpoint that has one, `checkpoints/step_N/hf`, or its `adapter`."""
    found = (folder / form for folder in reversed(_checkpoints(run_dir)) for form in ("hf", "adapter"))
    return next(filter(Path.is_dir, found), None)


def _checkpoints(run_dir: Path) -> list[Path]:
    """The folders of those that are whole, by step: names of others end in a word."""
    steps = {path: path.name.removeprefix("step_") for path in run_dir.glob("checkpoints/step_*")}
    return sorted((path for path, step in steps.items() if step.isdigit()), key=lambda path: int(steps[path]))


def print_summary(
    summary: Summary, console: Console | None = None, more: Iterable[tuple[str, str]] = ()
) -> None:
    """Print to standard output by default, and `more` after it. Paths are never wrapped, so that they can be
    copied; what the console's encoding lacks is a question mark."""
    console = console or Console()

    def show(label: str, text: str, style: str = "dim") -> None:
        line = f"{label:18} ", text
        known, told = (part.encode(console.encoding, "replace").decode(console.encoding) for part in line)
        console.print(Text.assemble((known, style), told), soft_wrap=True)

    for label, text in (*rows(summary), *more):
        show(label, text)
    for step, text in summary.warnings[:SHOWN_WARNINGS]:
        show("warning", f"step {step:,}: {text}", "yellow")
    if (others := len(summary.warnings) - SHOWN_WARNINGS) > 0:
        console.print(Text.assemble((f"{'':19}", "dim"), f"and {others:,} more warnings, in the report"))


def rows(s: Summary) -> Iterator[tuple[str, str]]:
    """The figures as people read them: what each is, and its text."""
    first = f"{number(s.reward_first, 3)} (first {min(FIRST_STEPS, s.steps)} steps)"
    last = f"{number(s.reward_last, 3)} (last {min(LAST_STEPS, s.steps)} steps)"
    rates = f"{number(s.generated_tokens_per_s)} generated, {number(s.trained_tokens_per_s)} trained"
    fates = f"{s.trained_groups:,} trained, {s.dropped_groups:,} dropped, {s.failed_groups:,} failed"
    yield "reward", f"{first} to {last}"
    yield "steps", f"{s.steps:,} in {duration(s.wall_s)}"
    yield "tokens per second", rates
    yield "staleness", f"mean {number(s.staleness_mean, 2)}, max {number(s.staleness_max)}"
    yield "idle", f"trainer {percent(s.idle_trainer)}, rollout {percent(s.idle_rollout)}"
    for kind, states in by_kind(s.times).items():
        if kind in (TRAINER, ROLLOUT, REWARD):
            yield f"{kind} time", in_words(states)
    if not math.isnan(s.useful_frac):
        yield "useful tokens", f"{percent(s.useful_frac)} of those that came to an end were trained on"
    yield "groups", f"{s.generated_groups:,} admitted: {fates}, {s.in_flight_groups:,} in flight at the end"
    if s.checkpoints:
        paused = (
            f"training waited {number(s.checkpoint_s, 1)} s for them ({percent(s.checkpoint_s / s.wall_s)})"
        )
        yield "checkpoints", f"{s.checkpoints} kept, {format_bytes(s.checkpoint_bytes)}; {paused}"
    yield "run directory", str(s.run_dir)
    yield "model", str(s.checkpoint) if s.checkpoint else "no checkpoint was saved"
    if (s.run_dir / BOARD_NAME).is_dir():
        yield "curves", s.board_command


def scores(metrics: Mapping[int, Mapping[str, float]]) -> Iterator[tuple[str, str]]:
    """The mean rewards on held-out prompts of the first and the last version that was evaluated, as `rows`.
    metrics: of each such version, in rising order."""
    versions = list(metrics)
    for key in (key for key in (metrics[versions[-1]] if versions else ()) if scored_set(key)):
        told = (
            f"{metrics[v][key]:.3f} ± {number(metrics[v].get(f'{key[:-4]}stderr', math.nan), 3)} "
            f"(version {v})"
            for v in dict.fromkeys((versions[0], versions[-1]))
            if key in metrics[v]
        )
        yield scored_set(key), " to ".join(told)


def _useful(line: Mapping[str, Any]) -> float:
    ended = [line.get(f"ledger/{fate}_tokens", 0) for fate in ("trained", "masked", "dropped", "failed")]
    return ended[0] / sum(ended) if sum(ended) else math.nan


def _mean(values: Sequence[float], weights: Sequence[float] | None = None) -> float:
    """Weighted mean of the values that are not NaN; NaN if there are none."""
    pairs = [(v, w) for v, w in zip(values, weights or [1.0] * len(values), strict=True) if not math.isnan(v)]
    total = math.fsum(w for _, w in pairs)
    return math.fsum(v * w for v, w in pairs) / total if total > 0 else math.nan
