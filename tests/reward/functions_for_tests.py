"""Reward functions, good and bad, that real child processes import."""

import asyncio
import ctypes
import math
import os
import signal
import stat
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path


def length(completions, **kwargs):
    return [float(len(text)) for text in completions]


def matches(completions, answer):
    """Takes two keywords only."""
    return [float(text == right) for text, right in zip(completions, answer, strict=True)]


def everything(prompts, completions, completion_ids, trainer_state, log_extra, log_metric, answer, **others):
    log_metric("steps_left", trainer_state.max_steps - trainer_state.global_step)
    log_metric("calls", 1)
    log_metric("calls", 3)
    log_extra("seen_prompt", prompts)
    log_extra("seen_completion", completions)
    log_extra("seen_ids", completion_ids)
    log_extra("seen_others", [sorted(others)] * len(completions))
    return [float(len(a)) for a in answer]


async def slow_but_async(completions, **kwargs):
    await asyncio.sleep(0)
    return [0.5 for _ in completions]


def runs_a_loop_of_its_own(completions, **kwargs):
    async def value():
        return 0.25

    return [asyncio.run(value()) for _ in completions]


def not_applicable(completions, **kwargs):
    return [None for _ in completions]


def first_only(completions, **kwargs):
    return [1.0] + [None] * (len(completions) - 1)


def nan(completions, **kwargs):
    return [1.0, math.nan]


def wrong_count(completions, **kwargs):
    return [1.0]


def says_yes(completions, **kwargs):
    return ["yes" for _ in completions]


def broken(completions, **kwargs):
    raise KeyError("the_missing_key")


def exits(completions, **kwargs):
    sys.exit(3)


def dies(completions, **kwargs):
    os._exit(7)


def segfaults(completions, **kwargs):
    ctypes.string_at(0)


def sleeps_in_c(completions, **kwargs):
    time.sleep(3600)


def spins(completions, **kwargs):
    while True:
        pass


def say_at_work(marker, pid=None):
    """Make the file `MARKER.at_work`, with this process's id in it, or another's."""
    at_work = Path(marker + ".at_work")
    at_work.with_suffix(".tmp").write_text(str(pid or os.getpid()))
    at_work.with_suffix(".tmp").rename(at_work)


def holds_the_gil(completions, marker, **kwargs):
    """A C call that never gives the interpreter back."""
    say_at_work(marker[0])
    ctypes.PyDLL(None).sleep(3600)


def hangs_at_first(completions, marker, **kwargs):
    """Hangs until the file named by the row exists, which its first call makes."""
    if not Path(marker[0]).exists():
        Path(marker[0]).touch()
        time.sleep(3600)
    return [1.0 for _ in completions]


def fails_at_first(completions, marker, **kwargs):
    if not Path(marker[0]).exists():
        Path(marker[0]).touch()
        raise RuntimeError("the first call always fails")
    return [1.0 for _ in completions]


def waits_for_file(completions, marker, **kwargs):
    """Says that it is at work and goes on when the file named by the row exists."""
    say_at_work(marker[0])
    while not Path(marker[0]).exists():
        time.sleep(0.005)
    return [1.0 for _ in completions]


def starts_a_process_and_hangs(completions, marker, **kwargs):
    child = subprocess.Popen(["sleep", "3600"])
    say_at_work(marker[0], child.pid)
    time.sleep(3600)


def chatters(completions, **kwargs):
    print("a line from print")
    sys.stdout.write("no newline")
    os.write(1, b"raw bytes to descriptor 1\n")
    subprocess.run(["echo", "from a subprocess"], check=True)
    assert sys.stdin.read() == ""
    return [1.0 for _ in completions]


def process_id(completions, **kwargs):
    return [float(os.getpid()) for _ in completions]


def unsendable_extra(completions, log_extra, **kwargs):
    log_extra("object", [object() for _ in completions])
    return [1.0 for _ in completions]


def numpy_values(completions, log_metric, log_extra, **kwargs):
    import numpy as np

    log_metric("array_mean", np.float32(0.5))
    log_extra("vector", np.arange(2 * len(completions)).reshape(-1, 2))
    return np.arange(len(completions), dtype=np.float32)


def surrogate_error(completions, **kwargs):
    raise ValueError("a lone surrogate \ud800")


def judge_comes_back(completions, calls, how, **_):
    """Away for the first two calls, by a file that counts them; as clients tell it."""
    path = Path(calls[0])
    before = int(path.read_text()) if path.exists() else 0
    path.write_text(str(before + 1))
    if before >= 2:
        return [1.0] * len(completions)
    if how[0] == "refused":
        raise ConnectionRefusedError("nobody listens")
    if how[0] == "wrapped":
        try:
            raise TimeoutError("timed out")
        except TimeoutError as error:
            raise RuntimeError("the client's own") from error
    error = RuntimeError("too many requests")
    error.status_code = 429 if how[0] == "busy" else 400
    raise error


def runs_a_program_with_a_neighbour(completions, folder, **_):
    """As rewards for code do: a program that imports a file beside it."""
    Path(folder[0], "solution.py").write_text("ANSWER = 4")
    Path(folder[0], "test_it.py").write_text("from solution import ANSWER\nassert ANSWER == 4")
    done = subprocess.run([sys.executable, "test_it.py"], cwd=folder[0], timeout=30, check=False)
    return [float(done.returncode == 0)] * len(completions)


def takes_too_long(completions, **_):
    raise TimeoutError("the candidate's program took too long")


async def waits_for_file_side_by_side(completions, marker, **_):
    """As `waits_for_file`, and gives its process's id."""
    say_at_work(marker[0])
    while not Path(marker[0]).exists():
        await asyncio.sleep(0.005)
    return [float(os.getpid())] * len(completions)


async def does(completions, what, **_):
    """Something bad, or nothing; in a task of its own, as `asyncio.gather` makes them."""

    async def it():
        if what[0] == "block for ever":
            time.sleep(3600)
        elif what[0] == "block for a while":
            time.sleep(1.5)
        elif what[0] == "never end":
            await asyncio.sleep(3600)
        elif what[0] == "die":
            os._exit(7)
        elif what[0] == "raise":
            raise KeyError("the_missing_key")
        else:
            await asyncio.sleep(0.1)

    await asyncio.gather(it())
    return [float(os.getpid())] * len(completions)


async def asks_a_judge(completions, marker, calls, **_):
    """Away until the file named by the row exists; keeps a line a call."""
    with Path(calls[0]).open("a") as file:
        file.write(f"{Path(marker[0]).name}\n")
    if not Path(marker[0]).parent.joinpath("is_back").exists():
        raise ConnectionRefusedError("nobody listens")
    return [1.0] * len(completions)


def asks_a_judge_for_some_rows(completions, marker, asks, **_):
    if asks[0] and not Path(marker[0]).exists():
        raise ConnectionRefusedError("nobody listens")
    return [1.0] * len(completions)


def does_as_told(completions, do, **columns):
    """Scores at once, dies, writes what it should not, or waits for a file, by its column `do`."""
    if do[0] == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if do[0] == "babble":
        for fd in range(3, 64):
            with suppress(OSError):  # closed, or to be read
                if stat.S_ISFIFO(os.fstat(fd).st_mode):
                    os.write(fd, b"\xff" * 64)
    if do[0] == "wait":
        return waits_for_file(completions, **columns)
    return [float(os.getpid())] * len(completions)
