"""The process of one cell: `python -m asyncrl.sweep.cell_process CONFIG --sweep PID [--gpus N]`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import asyncrl
from asyncrl.runtime.lifeline import end_with
from asyncrl.sweep.folder import mark_finished

EXIT_FAILED, EXIT_INTERRUPTED = 1, 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run the config to its end and mark its directory as finished; the exit status."""
    parser = argparse.ArgumentParser(prog="asyncrl.sweep.cell_process")
    parser.add_argument("config", type=Path)
    parser.add_argument("--sweep", type=int, required=True, metavar="PID")
    parser.add_argument("--gpus", type=int)
    arguments = parser.parse_args(argv)
    end_with(arguments.sweep)
    try:
        result = asyncrl.run(arguments.config, gpus=arguments.gpus)
    except asyncrl.AsyncRLError as error:
        print(error, file=sys.stderr)
        return EXIT_FAILED
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    mark_finished(result.run_dir)
    return 0


if __name__ == "__main__":
    sys.exit(main())
