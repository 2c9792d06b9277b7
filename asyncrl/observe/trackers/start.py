"""The processes of a run's trackers, seen from the process that starts them. A run never waits for a tracker
while it goes on, and none can end it."""

from __future__ import annotations

import asyncio
import os
import re
import secrets
import shlex
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import msgspec

from asyncrl.observe.metrics import FILE_NAME
from asyncrl.observe.trackers.base import TrackedRun
from asyncrl.observe.trackers.follow import FOLDER
from asyncrl.paths import replace_file
from asyncrl.resolve import OWN_PATH

LOOK_S = 0.2
STILL_S = 300.0
"""After which a tracker that neither has brought nor said anything is given up, where it is waited for."""
END_S, TOLD_S = 30.0, 3.0
"""What a tracker may take at the end of a run to write what is left, and when it is told that it does."""


class Start(msgspec.Struct, frozen=True):
    """What the process of a tracker is told. factory: what makes the tracker, as `package.module:name`."""

    tracker: str
    factory: str
    run: TrackedRun


def marks_of(run_dir: Path, tracker: str) -> Path:
    """The file in which `Following` keeps what a tracker has."""
    return run_dir / FOLDER / re.sub(r"\W+", "_", tracker)


def tracked_run(run_dir: Path, project: str, settings: Mapping[str, Any]) -> TrackedRun:
    """What trackers are told of a run. settings: by dotted key."""
    path = run_dir.absolute()
    (path / FOLDER).mkdir(exist_ok=True)
    identity = path / FOLDER / "id"
    if not identity.exists():
        replace_file(identity, secrets.token_hex(4).encode())
    plain = {key: v if isinstance(v, int | float | str) else str(v) for key, v in settings.items()}
    return TrackedRun(str(path), path.name, identity.read_text(), project, plain)


class TrackerProcess:
    """One tracker's. The end of its input tells it that the run has ended, however that came about."""

    def __init__(self, tracker: str, factory: str, run: TrackedRun) -> None:
        self.tracker = tracker
        self._marks = marks_of(run.folder, tracker)
        self.log = run.folder / "logs" / f"tracker-{self._marks.name}.log"
        self.log.parent.mkdir(exist_ok=True)
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", __package__],
                env=os.environ | OWN_PATH,
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C is for the run
            )
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # it has failed already
            self._process.stdin.write(msgspec.json.encode(Start(tracker, factory, run)) + b"\n")
            self._process.stdin.flush()

    @property
    def has_ended(self) -> bool:
        return self._process.poll() is not None

    def end(self) -> None:
        """The run has ended: write what is left."""
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):
            self._process.stdin.close()

    def wait(self) -> str | None:
        """Until it has ended, or has stood still for `STILL_S`, when it is killed. Returns what has gone
        wrong, if anything has."""
        moved, since_s = self._moved(), time.monotonic()
        while not self.has_ended:
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(LOOK_S)
            if (now := self._moved()) != moved:
                moved, since_s = now, time.monotonic()
            elif time.monotonic() - since_s > STILL_S and not self.has_ended:
                self.kill()
                return f"it has brought nothing for {STILL_S:.0f} s, and was ended"
        return self.failure()

    def _moved(self) -> list[int]:
        """When it last brought something, and said something."""
        return [path.stat().st_mtime_ns for path in (self._marks, self.log) if path.exists()]

    def kill(self) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, 9)
        self._process.wait()

    def failure(self) -> str | None:
        """What has ended it, if it has failed."""
        status = self._process.poll()
        if status == 1:  # it has said why
            with suppress(OSError, IndexError):
                return self.log.read_text("utf-8", "replace").splitlines()[-1]
        return f"status {status}" if status else None


@asynccontextmanager
async def tracked(
    trackers: Mapping[str, str], run_dir: Path, told_of: Callable[[], TrackedRun], tell: Callable[[str], None]
) -> AsyncIterator[None]:
    """Bring what the body writes to trackers, from the first finished step on. trackers: what makes each, by
    its name. tell: is told, once, of one that has failed."""
    waiting = dict(trackers)
    running: list[TrackerProcess] = []

    def give_up(tracker: str, why: object) -> None:
        again = f"asyncrl track {shlex.quote(str(run_dir))} --to {shlex.quote(tracker)}"
        tell(f"the tracker {tracker} is given up: {why}; to bring it the rest: {again}")

    def look() -> None:
        while waiting and (run_dir / FILE_NAME).exists():
            tracker, factory = waiting.popitem()
            try:
                running.append(TrackerProcess(tracker, factory, told_of()))
            except OSError as error:
                give_up(tracker, error)
        for process in [process for process in running if process.has_ended]:
            running.remove(process)
            if (why := process.failure()) is not None:
                give_up(process.tracker, f"{why} (see {process.log})")

    async def watch() -> None:
        while True:
            await asyncio.sleep(LOOK_S)
            look()

    watching = asyncio.create_task(watch())
    try:
        yield
    finally:
        watching.cancel()
        try:
            look()
            await _ended(running, tell)
            look()
        finally:
            for process in running:
                give_up(process.tracker, f"it was not done {END_S:.0f} s after the end of the run")
                process.kill()


async def _ended(running: Sequence[TrackerProcess], tell: Callable[[str], None]) -> None:
    """Let all write what is left. Returns after `END_S` at the latest."""
    for process in running:
        process.end()
    began_s, is_told = time.monotonic(), False
    while (late := [process.tracker for process in running if not process.has_ended]) and (
        waited_s := time.monotonic() - began_s
    ) < END_S:
        if waited_s > TOLD_S and not is_told:
            is_told = True
            tell(f"the run has ended; {', '.join(late)} may take {END_S:.0f} s to write the rest")
        await asyncio.sleep(LOOK_S / 10)
