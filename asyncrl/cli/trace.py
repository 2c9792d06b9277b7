"""`asyncrl trace`: what the processes of a run did, for Perfetto."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "trace",
        help="write what every process of a run did, for https://ui.perfetto.dev",
        description="Write one trace of what every process of a run with observe.trace=true did: its states, "
        "waits and steps, and the requests in each slot of an engine by weight version. Of a run that has "
        "ended, goes on or was killed. Open the file at https://ui.perfetto.dev.",
    )
    parser.add_argument("run_dir", type=Path, metavar="RUN_DIR")
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="file to write (default: RUN_DIR/trace.json.gz)"
    )
    parser.set_defaults(run=_write)


def _write(arguments: argparse.Namespace) -> None:
    from asyncrl.report.trace import write_trace

    print(write_trace(arguments.run_dir, arguments.out))
