"""`asyncrl report`: what a run did, in one HTML file."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "report",
        help="write what a run did, or several runs beside each other, to one HTML file",
        description="Write one HTML file that needs no network: curves, where every token and the time went, "
        "drift by token age, responses, warnings, settings. Of a run that has ended, goes on or was killed; "
        "several are drawn into the same charts.",
    )
    parser.add_argument("run_dirs", nargs="+", type=Path, metavar="RUN_DIR")
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        help="file to write (default: RUN_DIR/report.html, or report.html here for several runs)",
    )
    parser.set_defaults(run=_write)


def _write(arguments: argparse.Namespace) -> None:
    from asyncrl.report.page import write_report

    print(write_report(arguments.run_dirs, arguments.out))
