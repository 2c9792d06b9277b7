"""`asyncrl samples`: shows responses of a run's policy."""

from __future__ import annotations

import argparse
from pathlib import Path

from asyncrl.errors import ConfigError


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "samples",
        help="show some of the responses that a run was trained on",
        description="Show some of the responses that a run was trained on: the best, the worst, the longest "
        "and the first of the batch, for every early step and for fewer and fewer later ones. Or show the "
        "responses that `asyncrl eval --responses` wrote.",
    )
    parser.add_argument("path", type=Path, metavar="RUN_DIR|FILE")
    parser.add_argument("--step", type=int, metavar="N", help="show this step (default: the latest)")
    kinds = parser.add_mutually_exclusive_group()
    for kind in ("best", "worst", "longest"):
        kinds.add_argument(
            f"--{kind}", dest="kind", action="store_const", const=kind, help=f"show only the {kind}"
        )
    parser.set_defaults(run=_show)


def _show(arguments: argparse.Namespace) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.text import Text

    from asyncrl.observe.samples import printable, read_samples

    try:
        samples = read_samples(arguments.path)
    except FileNotFoundError:
        samples = []
    if not samples:
        raise ConfigError(f"{arguments.path}: it has no samples (samples.jsonl), or none yet")
    steps = sorted({sample.step for sample in samples})
    step = steps[-1] if arguments.step is None else arguments.step
    if step not in steps:
        near = min(steps, key=lambda there: abs(there - step))
        raise ConfigError(f"--step {step}: there are no samples of this step; the nearest are of step {near}")
    console = Console(highlight=False)
    for sample in samples:
        if sample.step != step or arguments.kind not in (None, *sample.chosen):
            continue
        parts = "".join(f", {escape(name)} {value:.3g}" for name, value in sample.parts.items())
        oldest, newest = sample.versions
        versions = f"version {oldest}" if oldest == newest else f"versions {oldest} to {newest}"
        heading = sample.model or f"step {sample.step}"
        if sample.chosen:
            heading += f", {' and '.join(sample.chosen)}"
        console.print(
            f"\n[bold]{escape(heading)}[/bold]: reward {sample.reward:.3g}{parts}; "
            f"{sample.tokens} tokens ({sample.finish}) of {versions}; row {sample.row}"
        )
        console.print(Text(printable(sample.prompt), style="dim"))
        console.print(Text(printable(sample.response)))
