"""Runs cells, several at a time, each in a process of its own, and leaves none behind."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Protocol

from asyncrl.config import Config, dump
from asyncrl.errors import ConfigError
from asyncrl.observe.metrics import FILE_NAME
from asyncrl.sweep.folder import SweepFolder
from asyncrl.sweep.grid import Cell

POLL_S = 1.0
STOP_GRACE_S = 30.0
"""Between the polite and the hard end of a cell; a run of several processes takes 10 seconds and more."""
CONFIG = "cell.yaml"
SHOWN_LINES = 15


class Report(Protocol):
    """Told how the sweep goes."""

    def started(self, cell: Cell) -> None: ...

    def ended(self, cell: Cell, problem: str | None) -> None:
        """problem: why it failed; None when it finished."""


class CellStalled(Exception):  # noqa: N818 - says what happened
    """A cell has shown no sign of life for too long."""


async def run_cells(
    cells: Sequence[Cell],
    folder: SweepFolder,
    lanes: Sequence[Mapping[str, str]],
    gpus: int | None,
    report: Report,
) -> None:
    """Run all cells, one at a time in each of the lanes. A cell that fails stops no other.

    lanes: what the environment of the processes in a lane has beside ours.
    """
    waiting = iter(cells)

    async def lane(environment: Mapping[str, str]) -> None:
        for cell in waiting:
            report.started(cell)
            report.ended(cell, await _run_cell(cell, folder, environment, gpus))

    async with asyncio.TaskGroup() as tasks:
        for environment in lanes:
            tasks.create_task(lane(environment))


async def _run_cell(
    cell: Cell, folder: SweepFolder, environment: Mapping[str, str], gpus: int | None
) -> str | None:
    """Why it failed; None when it has finished."""
    try:
        run_dir = folder.make_room(cell)
    except ConfigError as error:
        return str(error)
    config = run_dir / CONFIG
    config.write_text(dump(cell.placed(run_dir)))
    options = [] if gpus is None else ["--gpus", str(gpus)]
    with folder.output(cell).open("wb") as output:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "asyncrl.sweep.cell_process", str(config)),
            *("--sweep", str(os.getpid()), *options),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env={**os.environ, **_threads(cell.config), **environment},
            start_new_session=True,  # Ctrl-C is ours to pass on
        )
    try:
        status = await _watch(process, cell.config, run_dir)
    except CellStalled as stalled:
        return f"{stalled}\n{_last_words(folder.output(cell))}"
    finally:
        await _stop(process)
    if folder.is_finished(cell):
        return None
    return f"it ended with status {status}\n{_last_words(folder.output(cell))}"


def _threads(config: Config) -> dict[str, str]:
    """Cells that compute beside each other keep to their threads, also while they only start. The roles of an
    `async` run get theirs from their launcher."""
    threads = config.trainer.threads if config.run.mode == "inline" else 1
    return {
        "OMP_NUM_THREADS": str(threads),
        "OMP_WAIT_POLICY": "passive",
        "TOKENIZERS_PARALLELISM": "false",
    }


async def _watch(process: asyncio.subprocess.Process, config: Config, run_dir: Path) -> int:
    """The process's exit status. Raises `CellStalled` when no step ends for as long as the run may take to
    start and then to make a step (it watches itself more closely)."""
    allowed_s = config.run.start_s + config.run.stall_s
    metrics, size, changed_s = run_dir / FILE_NAME, 0, time.monotonic()
    while True:
        with suppress(TimeoutError):
            return await asyncio.wait_for(process.wait(), POLL_S)
        now = metrics.stat().st_size if metrics.exists() else 0
        if now != size:
            size, changed_s = now, time.monotonic()
        elif time.monotonic() - changed_s > allowed_s:
            raise CellStalled(f"it was stopped: no step has ended for {allowed_s:g} s")


async def _stop(process: asyncio.subprocess.Process) -> None:
    """End a process that is still there: by SIGTERM, and after a grace time by SIGKILL."""
    if process.returncode is not None:
        return
    with suppress(ProcessLookupError):
        process.terminate()
    try:
        await asyncio.wait_for(process.wait(), STOP_GRACE_S)
    except TimeoutError:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        await asyncio.wait_for(process.wait(), STOP_GRACE_S)


def _last_words(output: Path) -> str:
    """The end of what it has printed, and where all of it is."""
    lines = output.read_text(errors="replace").splitlines()[-SHOWN_LINES:]
    return "\n".join([*(f"  {line}" for line in lines), f"  (all of it: {output})"])
