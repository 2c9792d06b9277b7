"""What every role's process does around its work: settings, log, an end in good order. Started by the
supervisor as

python -m asyncrl.cluster.role NAME --run-dir DIR --supervisor PID
"""

from __future__ import annotations

import argparse
import asyncio
import faulthandler
import importlib
import json
import logging
import signal
import sys
import traceback
from collections.abc import Awaitable, Callable, Iterator, Sequence
from pathlib import Path

from asyncrl import config as settings
from asyncrl.affinity import pin
from asyncrl.cluster.kinds import kind_of, role_sets
from asyncrl.config import Config
from asyncrl.core.invariants import InvariantError
from asyncrl.data.hub import with_folders
from asyncrl.errors import AsyncRLError, RunFailed, is_no_room
from asyncrl.event_loop import idle_is_waiting
from asyncrl.lifeline import end_with, leave
from asyncrl.liveness.status import tell_beginning
from asyncrl.resolve import forget_own_path
from asyncrl.runfiles.layout import RunDir
from asyncrl.states import CLOCK
from asyncrl.trace import RUN_BYTES, recording
from asyncrl.weights.source import WeightsError

FATAL = "fatal: "
"""Starts the last message of a role that ends with an error meant for people."""

PAST_HELP = 3
"""Exit status of a role that would fail again if it were started again."""

NO_ROOM = 4
"""Exit status of a role that could not write, the disk being full."""

BAD_WEIGHTS = 5
"""Exit status of a worker that has not got the weights whole that the trainer shares."""


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="asyncrl.cluster.role")
    parser.add_argument("name")
    parser.add_argument("--run-dir", type=Path, required=True)
    parser.add_argument("--supervisor", type=int, required=True, metavar="PID")
    args = parser.parse_args(argv)
    CLOCK.begin()
    CLOCK.enter("start")  # until it has a pulse
    forget_own_path()
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1, RunDir(args.run_dir).stacks(args.name).open("a"), all_threads=True)
    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s", stream=sys.stderr
    )
    tell_beginning(RunDir(args.run_dir).beginning(args.name))
    pin()  # before any thread is started
    end_with(args.supervisor)
    try:
        # What only answers others has nothing to do while it waits for them.
        loop = idle_is_waiting if kind_of(args.name).is_hub else None
        with asyncio.Runner(loop_factory=loop) as runner:
            runner.run(_until_terminated(args.name, args.run_dir))
    except asyncio.CancelledError:
        return 128 + signal.SIGTERM
    except Exception as error:  # noqa: BLE001 - this process ends with it
        if any(map(is_no_room, _leaves(error))):
            return NO_ROOM  # the log may be on that disk
        return _report(error)
    return 0


async def _until_terminated(name: str, run_dir: Path) -> None:
    task = asyncio.current_task()
    assert task is not None
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    config = _config(RunDir(run_dir))
    roles = sum(len(of.roles) for of in role_sets(config))
    with recording(RunDir(run_dir).spans if config.observe.trace else None, name, RUN_BYTES // roles):
        await _entry(name)(config, run_dir, name)


def _entry(role: str) -> Callable[[Config, Path, str], Awaitable[None]]:
    """Not by `resolve`, which puts the working folder on the path: no file in it must pass for a package."""
    module, _, name = kind_of(role).entry.partition(":")
    entry: Callable[[Config, Path, str], Awaitable[None]] = getattr(importlib.import_module(module), name)
    return entry


def _config(run_dir: RunDir) -> Config:
    """The run's settings, with the folders of its models."""
    return with_folders(settings.load(run_dir.config), json.loads(run_dir.model_folders.read_text()))


def _report(error: Exception) -> int:
    """Tell what has ended this role: errors meant for people by their words, defects by their traceback.
    Returns the exit status."""
    errors = list(_leaves(error))
    for_people = [e for e in errors if isinstance(e, AsyncRLError | InvariantError)]
    if any(not isinstance(e, AsyncRLError) for e in errors):
        traceback.print_exception(error)
    for e in for_people:
        print(f"{FATAL}{e}", file=sys.stderr)
    # Whoever trains on after a broken promise makes it worse.
    if any(isinstance(e, RunFailed | InvariantError) for e in errors):
        return PAST_HELP
    return BAD_WEIGHTS if any(isinstance(e, WeightsError) for e in errors) else 1


def _leaves(error: BaseException) -> Iterator[BaseException]:
    if isinstance(error, BaseExceptionGroup):
        for inner in error.exceptions:
            yield from _leaves(inner)
    else:
        yield error


if __name__ == "__main__":
    leave(main())
