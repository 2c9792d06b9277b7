"""`asyncrl metrics-docs`: writes the reference of all metrics from their table."""

from __future__ import annotations

from collections.abc import Iterator

from asyncrl.observe.metric_table import GROUPS, OVERVIEW, MetricGroup
from asyncrl.states import STATES

_INTRODUCTION = """\
# Metrics

<!-- Written by `asyncrl metrics-docs` from asyncrl/observe/metric_table.py. Do not edit: change it there. -->

`metrics.jsonl` in a run directory has one line of JSON for every training step. TensorBoard
(`tensorboard --logdir runs`) shows the same numbers as curves. A number that is not finite is null; a
histogram has `edges` and the `counts` between them. Names in **bold** are in every line; the others appear
where they apply to the run. A part in braces stands for a name that differs from run to run.

TensorBoard opens on `0_overview`: {overview}.
The metrics by the age of the tokens come last (`z_age/...`)."""


_STATES = """
## States

What a role does in each. It may do several things at a time: a moment counts for the first of them in this
order.

| state | the role |
|---|---|"""


def render() -> str:
    """The reference as Markdown: a table for each group of metrics."""
    overview = ", ".join(f"`{key}`" for key in OVERVIEW)
    tables = (line for group in GROUPS for line in _table(group))
    states = (f"| `{state}` | {meaning} |" for state, meaning in STATES.items())
    parts = [_INTRODUCTION.replace("{overview}", overview), *tables, _STATES, *states]
    return "\n".join(parts) + "\n"


def _table(group: MetricGroup) -> Iterator[str]:
    yield f"\n## {group.title}\n"
    if group.when:
        yield f"{group.when}\n"
    yield "| metric | unit | meaning |\n|---|---|---|"
    for metric in group.metrics:
        name = f"**`{metric.name}`**" if metric.is_always else f"`{metric.name}`"
        yield f"| {name} | {metric.unit} | {metric.meaning.replace('|', chr(92) + '|')} |"
