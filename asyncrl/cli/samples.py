"""`asyncrl samples`: shows responses of a run's policy."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from asyncrl.errors import ConfigError

if TYPE_CHECKING:
    from rich.console import Console

    from asyncrl.observe.samples import Sample

KINDS = ("best", "worst", "longest", "random")


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "samples",
        help="read some of the responses that a run was trained on",
        description="Read some of the responses that a run was trained on: the best, the worst, the longest, "
        "the first of the batch and one at random, for every early step and for fewer and fewer later ones. "
        "Or the responses that `asyncrl eval --responses` wrote. On a terminal they are browsed by keys, "
        "from the latest on; elsewhere those of the latest step are printed.",
    )
    parser.add_argument("path", type=Path, metavar="RUN_DIR|FILE")
    parser.add_argument("--step", type=int, metavar="N", help="show this step (default: the latest)")
    kinds = parser.add_mutually_exclusive_group()
    for kind in KINDS:
        kinds.add_argument(
            f"--{kind}", dest="kind", action="store_const", const=kind, help=f"show only the {kind}"
        )
    parser.add_argument(
        "--where",
        action="append",
        default=[],
        metavar="CONDITION",
        help="show only those of which this holds: 'reward<0.5', 'PART>=1', 'tokens>100', 'version=3', "
        "finish=length, row=7 ...; repeatable, all must hold",
    )
    parser.add_argument("--contains", metavar="TEXT", help="show only those with this text")
    parser.add_argument("--print", action="store_true", help="print them, on a terminal too")
    parser.add_argument(
        "--export",
        type=Path,
        metavar="FILE",
        help="write all that are asked for, of every step, to FILE.jsonl or FILE.parquet",
    )
    parser.set_defaults(run=_show)


def _show(arguments: argparse.Namespace) -> None:
    from rich.console import Console

    from asyncrl.observe.samples import read_samples

    try:
        everything = read_samples(arguments.path)
    except FileNotFoundError:
        everything = []
    if not everything:
        raise ConfigError(f"{arguments.path}: it has no samples (samples.jsonl), or none yet")
    samples = _wanted(everything, arguments)
    if arguments.export is not None:
        _export(samples, arguments.export)
        return
    console = Console(highlight=False)
    if sys.stdout.isatty() and sys.stdin.isatty() and not console.is_dumb_terminal and not arguments.print:
        from asyncrl.observe.keys import Keys
        from asyncrl.observe.pager import browse

        latest = samples[-1].step
        with Keys() as keys:
            browse(samples, keys, console, next(i for i, s in enumerate(samples) if s.step == latest))
        return
    asked = arguments.where or arguments.contains
    _print([sample for sample in samples if asked or sample.step == samples[-1].step], console)


def _wanted(samples: Sequence[Sample], arguments: argparse.Namespace) -> list[Sample]:
    """Raises `ConfigError` where there is none."""
    from asyncrl.observe.sample_filter import Condition

    steps = sorted({sample.step for sample in samples})
    if (step := arguments.step) is not None and step not in steps:
        near = min(steps, key=lambda there: abs(there - step))
        raise ConfigError(f"--step {step}: there are no samples of this step; the nearest are of step {near}")
    conditions = [Condition.parse(text) for text in arguments.where]
    for condition in conditions:
        condition.check(samples)
    found = [
        sample
        for sample in samples
        if step in (None, sample.step)
        and arguments.kind in (None, *sample.chosen)
        and all(condition.holds(sample) for condition in conditions)
        and (arguments.contains or "") in f"{sample.prompt}{sample.response}"
    ]
    if not found:
        raise ConfigError(f"{arguments.path}: none of its {len(samples):,} samples is as asked for")
    return found


def _print(samples: Sequence[Sample], console: Console) -> None:
    from rich.text import Text

    from asyncrl.observe.sample_text import Colours, as_text
    from asyncrl.observe.samples import printable

    for sample in samples:
        heading = Text("\n").append(printable(sample.heading()), "bold")
        console.print(heading.append(f": {printable(sample.facts())}", "not bold"), soft_wrap=True)
        console.print(as_text(sample, Colours()), soft_wrap=True)


def _export(samples: Sequence[Sample], path: Path) -> None:
    from asyncrl.observe.samples import as_table
    from asyncrl.packages import need

    writers = (".jsonl", ".parquet")
    if path.suffix not in writers:
        raise ConfigError(f"--export {path}: name a file that ends in {' or '.join(writers)}")
    try:
        if path.suffix == ".jsonl":
            path.write_bytes(b"".join(sample.line() for sample in samples))
        else:
            need("pyarrow", "--export FILE.parquet", "write FILE.jsonl")
            import pyarrow
            from pyarrow.parquet import write_table

            write_table(pyarrow.table(as_table(samples)), path)
    except OSError as error:
        raise ConfigError(
            f"--export {path}: cannot be written ({error.strerror}); name another file"
        ) from None
    print(f"{path}: {len(samples):,} samples")
