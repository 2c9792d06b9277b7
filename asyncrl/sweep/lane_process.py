"""The process of a lane. It runs cells one after another, each in a process forked from it:

    python -m asyncrl.sweep.lane_process [--gpus N] [--thin]

For each cell it reads two lines of standard input, the paths of the cell's config and of its output, and
writes the cell's exit status as a line of standard output. When its input ends, it stops the current cell.

Importing torch and transformers takes longer than a short run, so a sweep does it once, and its lanes are
forked from the process that has. A lane computes nothing itself, because a fork keeps only one of a process's
threads.
"""

from __future__ import annotations

import argparse
import os
import select
import signal
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

from asyncrl.config import load
from asyncrl.errors import AsyncRLError
from asyncrl.launch.launcher import resume, run
from asyncrl.lifeline import end_with
from asyncrl.runfiles.layout import RunDir
from asyncrl.sweep import record
from asyncrl.sweep.folder import thin
from asyncrl.sweep.lane import STOP_GRACE_S

EXIT_FAILED, EXIT_INTERRUPTED = 1, 130
POLL_S = 0.05


def main(argv: Sequence[str] | None = None) -> int:
    """Run the requested cells. Returns the exit status of this process, which may be the lane or a cell."""
    parser = argparse.ArgumentParser(prog="asyncrl.sweep.lane_process")
    parser.add_argument("--gpus", type=int)
    parser.add_argument("--thin", action="store_true")
    options = parser.parse_args(argv)
    requests = os.fdopen(os.dup(0), "rb", buffering=0)
    answers = os.fdopen(os.dup(1), "wb", buffering=0)
    origin = record.origin()
    while config := _path(requests.readline()):
        _speak_to(_path(requests.readline()))
        cell = _fork()
        if cell is None:
            requests.close()
            answers.close()
            return _run(config, options, origin)
        if (status := _wait(cell, requests)) is None:
            break
        answers.write(b"%d\n" % status)
    return 0


def _path(line: bytes) -> str:
    return os.fsdecode(line.rstrip(b"\n"))


def _speak_to(output: str) -> None:
    """Send the output of this process and its children to the file, and give them no input."""
    with Path(output).open("wb") as file, Path(os.devnull).open("rb") as nothing:
        os.dup2(nothing.fileno(), 0)
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)


def _fork() -> int | None:
    """In the lane, the id of the cell's process; in the cell, None."""
    import asyncrl.loop.inline  # noqa: F401 - for the cell; here, so that a failure shows in its output

    sys.stdout.flush()
    sys.stderr.flush()
    lane = os.getpid()
    if cell := os.fork():
        return cell
    os.setsid()  # so that it can be killed together with the roles that it starts
    end_with(lane)
    return None


def _run(config: str, options: argparse.Namespace, origin: record.Record) -> int:
    """Run the config, unless that has been done, score its final weights, and leave the record that marks its
    directory as finished. Returns the exit status."""
    try:
        settings = load(config)
        folder = RunDir(Path(str(settings.run.dir)))
        again = folder.config.is_file()  # `make_room` leaves no other
        result = resume(folder.path, gpus=options.gpus) if again else run(config, gpus=options.gpus)
        scored = result.run_dir / record.SCORED
        done = record.completed(origin, settings, result.checkpoint, lambda n: scored.write_text(str(n)))
    except AsyncRLError as error:
        print(error, file=sys.stderr)
        return EXIT_FAILED
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    record.write(result.run_dir / record.FINISHED, done)
    scored.unlink(missing_ok=True)
    if options.thin:  # what was cut short here is finished, and not half a run to go on with
        thin(result.run_dir)
    return 0


def _wait(cell: int, requests: BinaryIO) -> int | None:
    """The cell's exit status, negative for a signal; None if the input ended and the cell was stopped."""
    while (status := _status(cell)) is None:
        if select.select([requests], [], [], POLL_S)[0]:  # the end: there are no requests meanwhile
            _stop(cell)
            return None
    return status


def _status(cell: int) -> int | None:
    ended, status = os.waitpid(cell, os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if ended else None


def _stop(cell: int) -> None:
    """Stop it by SIGTERM, and after a grace period by SIGKILL."""
    os.kill(cell, signal.SIGTERM)
    patient_until_s = time.monotonic() + STOP_GRACE_S
    while _status(cell) is None:
        if time.monotonic() > patient_until_s:
            with suppress(ProcessLookupError):
                os.killpg(cell, signal.SIGKILL)
        time.sleep(POLL_S)


if __name__ == "__main__":
    sys.exit(main())
