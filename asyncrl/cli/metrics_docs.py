"""`asyncrl metrics-docs`: writes the reference of all metrics from their table."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from asyncrl.observe.metric_table import GROUPS, OVERVIEW, MetricGroup

_INTRODUCTION = """\
# Metrics

<!-- Written by `asyncrl metrics-docs` from asyncrl/observe/metric_table.py. Do not edit: change it there. -->

`metrics.jsonl` in a run directory has a line of JSON for every training step, and TensorBoard
(`tensorboard --logdir runs`) the same numbers as curves. A number that is not finite is null. Names in
**bold** are in every line; the others are where a run has what they tell of. A part in braces stands for a
name of the run's own.

TensorBoard opens on `0_overview`: {overview}.
What is told by the age of the tokens comes last (`z_age/...`)."""


def write(path: Path) -> None:
    """Write the reference to `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(render(), encoding="utf-8")


def render() -> str:
    """The reference as Markdown: a table for each group of metrics."""
    overview = ", ".join(f"`{key}`" for key in OVERVIEW)
    tables = (line for group in GROUPS for line in _table(group))
    return "\n".join([_INTRODUCTION.replace("{overview}", overview), *tables]) + "\n"


def _table(group: MetricGroup) -> Iterator[str]:
    yield f"\n## {group.title}\n"
    if group.when:
        yield f"{group.when}\n"
    yield "| metric | unit | meaning |\n|---|---|---|"
    for metric in group.metrics:
        name = f"**`{metric.name}`**" if metric.is_always else f"`{metric.name}`"
        yield f"| {name} | {metric.unit} | {metric.meaning.replace('|', chr(92) + '|')} |"
