"""Inspects a user's functions by importing them in a temporary process, since their imports may be large,
take a GPU, or never return."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import msgspec

from asyncrl.errors import ConfigError, NotHereError
from asyncrl.lifeline import die_with
from asyncrl.paths import replace_file
from asyncrl.resolve import OWN_PATH, file_of, forget_own_path, loaded_files, resolve, resolve_plain
from asyncrl.reward.functions import needed_columns
from asyncrl.scratch import scratch_folder

LIMIT_S = 120.0
"""Longest time for the process to start and import the functions."""


class Wanted(msgspec.Struct, frozen=True):
    """reward: reward functions. objective: functions of the objective, by the keys that name them. settings:
    the settings of these. episode: a user-defined episode. choices: functions that choose, by their keys."""

    reward: list[str] = []
    objective: dict[str, str] = {}
    settings: dict[str, Any] = {}
    episode: str | None = None
    choices: dict[str, str] = {}

    @property
    def specs(self) -> list[str]:
        """The specs of all functions."""
        episode = [self.episode] if self.episode else []
        return [*self.reward, *self.objective.values(), *episode, *self.choices.values()]


class ImportProblem(msgspec.Struct, frozen=True):
    """The parts of a `ConfigError`, or of a `NotHereError` if there is a `command`."""

    what: str
    command: str | None = None
    advice: str | None = None

    def tell(self) -> None:
        """Raise it."""
        if self.command is None:
            raise ConfigError(self.what)
        raise NotHereError(self.what, command=self.command, advice=self.advice)


class Found(msgspec.Struct, frozen=True):
    problems: list[ImportProblem] = []
    needs: dict[str, list[str]] = {}
    """The columns that each function of rewards or choices requires."""
    files: dict[str, str] = {}
    """The file of each user-defined function."""
    digests: dict[str, str] = {}
    """Digests of all files imported from the user's folders, by path."""


def look(wanted: Wanted) -> Found:
    """Import the functions in a process that is killed afterwards, with everything that it has started."""
    if not wanted.specs:
        return Found()
    with scratch_folder() as folder:
        question, answer = folder / "wanted", folder / "found"
        question.write_bytes(msgspec.msgpack.encode(wanted))
        process = subprocess.Popen(
            [sys.executable, "-m", "asyncrl.runfiles.user_code", str(os.getpid()), str(folder)],
            stdin=subprocess.DEVNULL,
            env={**os.environ, **OWN_PATH},
            start_new_session=True,
        )
        try:
            how = f"the process died (exit status {process.wait(LIMIT_S)}) while importing them"
        except subprocess.TimeoutExpired:
            how = f"not imported after {LIMIT_S:g} s; do less at import time"
        finally:
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        if answer.exists():
            return msgspec.msgpack.decode(answer.read_bytes(), type=Found)
    return Found([ImportProblem(f"functions {', '.join(wanted.specs)}: {how}")])


def look_here(wanted: Wanted) -> Found:
    """Import the functions in this process."""
    problems, needs, files = [], {}, {}

    @contextmanager
    def noting() -> Iterator[None]:
        try:
            yield
        except ConfigError as error:
            problems.append(_problem(error))

    for spec in wanted.reward:
        with noting():
            function = resolve_plain(spec, "reward function")
            needs[spec], files[spec] = needed_columns(function), file_of(function)
    if wanted.episode is not None:
        from asyncrl.rollout.episodes.program import load_program

        with noting():
            load_program(wanted.episode)
            files[wanted.episode] = file_of(resolve(wanted.episode, what="rollout.episode"))
    for key, spec in wanted.choices.items():
        with noting():
            function = resolve_plain(spec, key)
            needs[spec], files[spec] = needed_columns(function), file_of(function)
    if wanted.objective:
        from asyncrl.objective.make import check_own  # imports torch

        with noting():
            check_own(wanted.objective, wanted.settings)
            files |= {spec: file_of(resolve(spec, what=key)) for key, spec in wanted.objective.items()}
    users = loaded_files()
    own = {spec: file for spec, file in files.items() if file is not None and file in users}
    return Found(problems, needs, own, users)


def _problem(error: ConfigError) -> ImportProblem:
    if isinstance(error, NotHereError):
        return ImportProblem(error.what, error.command, error.advice)
    return ImportProblem(str(error))


def main() -> None:
    die_with(int(sys.argv[1]))
    forget_own_path()
    os.dup2(2, 1)  # modules may print at import
    folder = Path(sys.argv[2])
    found = look_here(msgspec.msgpack.decode((folder / "wanted").read_bytes(), type=Wanted))
    replace_file(folder / "found", msgspec.msgpack.encode(found))
    sys.stderr.flush()
    os._exit(0)  # no thread or exit handler of the user's code delays it


if __name__ == "__main__":
    main()
