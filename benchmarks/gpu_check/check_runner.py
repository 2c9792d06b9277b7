"""Runs a step in a process of its own."""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

from check_model import Size
from check_step import FAILED, NOT_THERE, Bench, NotThere, Result, Step

from asyncrl.errors import AsyncRLError

END_S = 10.0
"""For a process that was asked to end to do so."""


def run_alone(step: Step, log: Path, scratch: Path, arguments: argparse.Namespace) -> Result:
    """What came of a step, whose output goes into `log`. `scratch`: a folder that all steps share."""
    out = scratch / f"{step.name}.json"
    command = [sys.executable, str(Path(__file__).parent), "--steps", step.name, "--child", str(out)]
    command += ["--device", arguments.device, *(["--small"] if arguments.small else [])]
    started = time.monotonic()
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, start_new_session=True
        )
        try:
            status, reason = process.wait(step.deadline_s), ""
        except subprocess.TimeoutExpired:
            status, reason = 1, f"it has not ended within {step.deadline_s:g} s and was killed"
        finally:
            _end(process)
    result = Result.from_json(out.read_text()) if out.exists() else Result()
    result.seconds = time.monotonic() - started
    if reason:  # whatever it managed to write while it was being ended
        result.verdict, result.reason = FAILED, reason
    elif result.verdict is None:
        how = f"was killed by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"
        result.verdict, result.reason = FAILED, f"its process {how}, see {log}"
    return result


def _end(process: subprocess.Popen[bytes]) -> None:
    """First politely, for a run that it has started to end its own roles; then all of its group."""
    for number in (signal.SIGINT, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
            process.wait(END_S)
        except (ProcessLookupError, subprocess.TimeoutExpired):
            continue


def run_here(step: Step, size: Size, arguments: argparse.Namespace) -> None:
    """In the step's process: its result goes into `arguments.child`, by and by."""
    out = arguments.child
    with tempfile.TemporaryDirectory(dir=out.parent) as scratch:
        models = out.parent / "models"
        models.mkdir(exist_ok=True)
        bench = Bench(arguments.device, arguments.small, size, models, Path(scratch), out)
        result = bench.result
        try:
            step.run(bench)
            result.judge()
        except NotThere as missing:
            result.verdict, result.reason = NOT_THERE, str(missing)
        except Exception as error:  # noqa: BLE001 - whatever it is, it is what the check is there to find
            traceback.print_exc()
            kind = "" if isinstance(error, AsyncRLError) else f"{type(error).__name__}: "
            result.verdict, result.reason = FAILED, f"{kind}{error}"
        bench.save()
