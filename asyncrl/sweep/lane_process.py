"""The process of a lane, which runs cells one after another, each in a process forked from it:

    python -m asyncrl.sweep.lane_process [--gpus N]

Reads the path of a cell's config and that for its output as two lines of standard input, writes the cell's
exit status as a line of standard output, and so on. When its input ends, it stops the cell that runs.

Importing torch and transformers takes longer than a short run does: a lane does it once. It computes nothing
itself, because a fork keeps only one of a process's threads.
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

from asyncrl.cluster.lifeline import end_with
from asyncrl.errors import AsyncRLError
from asyncrl.launch.launcher import run
from asyncrl.sweep.folder import mark_finished
from asyncrl.sweep.lane import STOP_GRACE_S

EXIT_FAILED, EXIT_INTERRUPTED = 1, 130
POLL_S = 0.05


def main(argv: Sequence[str] | None = None) -> int:
    """Run what is asked for; the exit status of this process, be it the lane or a cell of it."""
    parser = argparse.ArgumentParser(prog="asyncrl.sweep.lane_process")
    parser.add_argument("--gpus", type=int)
    gpus = parser.parse_args(argv).gpus
    requests = os.fdopen(os.dup(0), "rb", buffering=0)
    answers = os.fdopen(os.dup(1), "wb", buffering=0)
    while config := _path(requests.readline()):
        _speak_to(_path(requests.readline()))
        cell = _fork()
        if cell is None:
            requests.close()
            answers.close()
            return _run(config, gpus)
        if (status := _wait(cell, requests)) is None:
            break
        answers.write(b"%d\n" % status)
    return 0


def _path(line: bytes) -> str:
    return os.fsdecode(line.rstrip(b"\n"))


def _speak_to(output: str) -> None:
    """Let what this process and its children print go into the file, and give them no input."""
    with Path(output).open("wb") as file, Path(os.devnull).open("rb") as nothing:
        os.dup2(nothing.fileno(), 0)
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)


def _fork() -> int | None:
    """The id of the cell's process, in the lane; None in the cell."""
    import asyncrl.loop.inline  # noqa: F401 - for the cell; here, so that a failure is in its output

    sys.stdout.flush()
    sys.stderr.flush()
    lane = os.getpid()
    if cell := os.fork():
        return cell
    os.setsid()  # it is ended together with the roles that it starts
    end_with(lane)
    return None


def _run(config: str, gpus: int | None) -> int:
    """Run the config to its end and mark its directory as finished; the exit status."""
    try:
        result = run(config, gpus=gpus)
    except AsyncRLError as error:
        print(error, file=sys.stderr)
        return EXIT_FAILED
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    mark_finished(result.run_dir)
    return 0


def _wait(cell: int, requests: BinaryIO) -> int | None:
    """The cell's exit status, below zero for a signal; None when the input has ended and it was stopped."""
    while (status := _status(cell)) is None:
        if select.select([requests], [], [], POLL_S)[0]:  # nothing is asked for while a cell runs
            _stop(cell)
            return None
    return status


def _status(cell: int) -> int | None:
    ended, status = os.waitpid(cell, os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if ended else None


def _stop(cell: int) -> None:
    """By SIGTERM, and after a grace time by SIGKILL."""
    os.kill(cell, signal.SIGTERM)
    patient_until_s = time.monotonic() + STOP_GRACE_S
    while _status(cell) is None:
        if time.monotonic() > patient_until_s:
            with suppress(ProcessLookupError):
                os.killpg(cell, signal.SIGKILL)
        time.sleep(POLL_S)


if __name__ == "__main__":
    sys.exit(main())
