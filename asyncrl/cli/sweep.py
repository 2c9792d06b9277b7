"""`asyncrl sweep`: a config over a grid of settings and seeds."""

from __future__ import annotations

import argparse
import sys
from dataclasses import fields
from pathlib import Path

EXIT_FAILED = 1


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--config", required=True, type=Path, metavar="FILE", help="YAML file with the settings"
    )
    parser.add_argument(
        "--grid",
        action="append",
        default=[],
        metavar="KEY=VALUE,...",
        help="a setting and the values to try, in YAML; repeat it to run every combination (default: what "
        "the config's section `sweep` compares)",
    )
    parser.add_argument("--seeds", type=int, metavar="N", help="runs of each combination (default: 1)")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="runs at the same time (default: 1)")
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="folder of the sweep (default: run.root/run.name-sweep)"
    )
    parser.add_argument("--gpus", type=int, metavar="N", help="GPUs for each run, 0 for the CPU only")
    parser.add_argument(
        "--target", type=float, metavar="REWARD", help="report when runs first reach this reward"
    )
    parser.add_argument(
        "--last", type=int, metavar="N", help="steps over which rewards are averaged (default: 10)"
    )
    parser.add_argument(
        "--kept",
        nargs=2,
        type=Path,
        metavar=("RUNS.csv", "CURVES.csv"),
        help="what an earlier sweep has written: its cells count as they are there (so give the same --last "
        "and --target), and are not run again",
    )
    parser.add_argument(
        "overrides", nargs="*", metavar="key.sub=value", help="settings that override the file, in all runs"
    )


def run(arguments: argparse.Namespace) -> int:
    """The exit status: 0 if every cell is finished, 1 if any failed."""
    from asyncrl.sweep import Sweep, plot, run_sweep

    sweep = Sweep(**{field.name: getattr(arguments, field.name) for field in fields(Sweep)})
    try:
        result = run_sweep(sweep)
    except KeyboardInterrupt:
        print("interrupted: everything has stopped; run the same command again to continue", file=sys.stderr)
        raise
    folder = result.folder
    print(f"\n{result.table.read_text()}")
    names = ("table.csv", "table.md", "report.md", "runs.csv", "curves.csv", "plot.png", "curves.png")
    print(f"written to {folder.path}: {', '.join(n for n in names if (folder.path / n).exists())}")
    if not plot.is_possible():
        print(plot.MISSING, file=sys.stderr)
    if result.failed:
        names = "\n".join(f"  {cell.name}: {folder.run_dir(cell)}" for cell in result.failed)
        print(f"{len(result.failed)} of {len(result.cells)} cells failed:\n{names}", file=sys.stderr)
        print("run the same command again to retry only these", file=sys.stderr)
        return EXIT_FAILED
    return 0
