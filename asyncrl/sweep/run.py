"""Runs cells, several at a time, each in its own process, and watches them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from pathlib import Path
from typing import Any

from asyncrl.cluster.hosts.fork_server import ForkServer
from asyncrl.config import Config, dump
from asyncrl.errors import ConfigError
from asyncrl.observe.metrics import FILE_NAME
from asyncrl.sweep.folder import CONFIG, SweepFolder
from asyncrl.sweep.grid import Cell
from asyncrl.sweep.lane import Lane
from asyncrl.sweep.progress import SweepProgress
from asyncrl.sweep.record import SCORED

POLL_S = 1.0
SHOWN_LINES = 15


class CellStalled(Exception):  # noqa: N818 - says what happened
    """A cell has made no progress for too long."""


async def run_cells(
    waiting: Callable[[], Sequence[Cell]],
    folder: SweepFolder,
    lanes: Sequence[Mapping[str, str]],
    gpus: int | None,
    progress: SweepProgress,
    thins: bool = False,
    fork_server: ForkServer | None = None,
) -> None:
    """Run cells, one at a time in each lane, until none waits. A failed cell does not stop the others.

    waiting: the cells that have not ended, in their order; what it returns may depend on the results of those
    that have. lanes: the environment variables of each lane's processes, in addition to ours. thins: keep no
    more of a finished cell than its figures. fork_server: forks the lanes.
    """
    started: set[Cell] = set()
    running: set[Cell] = set()
    ended = asyncio.Condition()

    async def next_cell() -> Cell | None:
        async with ended:
            while True:
                cell = next((cell for cell in waiting() if cell not in started), None)
                if cell is not None:
                    started.add(cell)
                    running.add(cell)
                if cell is not None or not running:
                    return cell
                await ended.wait()  # what runs is watched: it ends

    async def run_lane(environment: Mapping[str, str]) -> None:
        async with Lane(environment, gpus, thins, fork_server) as lane:
            while (cell := await next_cell()) is not None:
                progress.started(cell)
                problem = await _run_cell(cell, folder, lane)
                progress.ended(cell, problem)
                async with ended:
                    running.remove(cell)
                    ended.notify_all()

    async with asyncio.TaskGroup() as tasks:
        for environment in lanes:
            tasks.create_task(run_lane(environment))


async def _run_cell(cell: Cell, folder: SweepFolder, lane: Lane) -> str | None:
    """The reason of its failure; None if it has finished."""
    try:
        run_dir = folder.make_room(cell)
    except ConfigError as error:
        return str(error)
    config, output = run_dir / CONFIG, folder.output(cell)
    config.write_text(dump(cell.placed(run_dir)))
    try:
        status = await _watch(lane.run(config.absolute(), output.absolute()), cell.config, run_dir)
    except CellStalled as stalled:
        await lane.stop()
        return f"{stalled}\n{_last_words(output)}"
    if folder.is_finished(cell):
        return None
    how = "its process was killed" if status is None else f"it ended with status {status}"
    return f"{how}\n{_last_words(output)}"


async def _watch(run: Coroutine[Any, Any, int | None], config: Config, run_dir: Path) -> int | None:
    """The run's exit status. Raises `CellStalled` if no step ends, and no held-out prompt is scored after the
    last, for as long as the run may take to start and to make a step. (The run watches itself more
    closely.)"""
    allowed_s = config.run.start_s + config.run.longest_step_s + config.reward.patience_s
    files = [run_dir / FILE_NAME, run_dir / SCORED]
    seen, changed_s = [*map(_stamp, files)], time.monotonic()
    running = asyncio.create_task(run)
    try:
        while not (await asyncio.wait([running], timeout=POLL_S))[0]:
            now = [*map(_stamp, files)]
            if now != seen:
                seen, changed_s = now, time.monotonic()
            elif time.monotonic() - changed_s > allowed_s:
                what = "no held-out prompt has been scored" if now[1] else "no step has ended"
                raise CellStalled(f"it was stopped: {what} for {allowed_s:g} s")
    finally:
        running.cancel()
    return running.result()


def _stamp(path: Path) -> tuple[int, int] | None:
    """By which a change is noticed; None where it is not there."""
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    return found.st_size, found.st_mtime_ns


def _last_words(output: Path) -> str:
    """The end of its output, and the path of the full output."""
    lines = output.read_text(errors="replace").splitlines()[-SHOWN_LINES:]
    return "\n".join([*(f"  {line}" for line in lines), f"  (full output: {output})"])
