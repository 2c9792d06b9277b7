"""Enforces the limits of a program: some by the kernel, the others from outside."""

from __future__ import annotations

import math
import os
import selectors
import signal
import subprocess
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from asyncrl.errors import AsyncRLError

LOOK_S = 0.05
"""Interval of checks for limits that the kernel does not enforce."""
STARVED_S = 300.0
"""A program that has neither ended nor hit a limit by then did not get its CPU time."""
KILL_TIMEOUT_S = 10.0
"""Longest wait for a process to be gone after SIGKILL."""
MAX_STDERR_BYTES = 4096


class SandboxError(AsyncRLError):
    """The sandbox could not be set up: nothing was run, and nothing is known about the program."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What a program may use. The kernel enforces the first four; the others are checked every `LOOK_S`
    seconds."""

    cpu_s: float = 5.0
    """CPU time of all threads, rounded up to whole seconds."""
    memory_bytes: int = 512 << 20
    """Address space, including the interpreter's."""
    file_bytes: int = 8 << 20
    """Size of each file."""
    open_files: int = 32
    idle_s: float = 20.0
    """Time in which it neither runs nor waits for a core, such as sleep. There is no further limit on
    wall-clock time: on a busy machine it would make right answers wrong."""
    output_bytes: int = 1 << 20
    """Everything that it prints, errors included."""
    folder_bytes: int = 32 << 20
    """All files in its folder. Deleted files that are still open do not count; they are bounded by
    `open_files` times `file_bytes`."""
    folder_files: int = 100
    threads: int = 32

    def for_kernel(self) -> dict[str, tuple[int, int]]:
        """Soft and hard limits, by their names in `resource`."""
        cpu_s = math.ceil(self.cpu_s)
        return {
            "RLIMIT_CPU": (cpu_s, cpu_s + 1),  # SIGXCPU tells the reason; SIGKILL follows if it is ignored
            "RLIMIT_AS": (self.memory_bytes, self.memory_bytes),
            "RLIMIT_FSIZE": (self.file_bytes, self.file_bytes),
            "RLIMIT_NOFILE": (self.open_files, self.open_files),
            "RLIMIT_CORE": (0, 0),
        }


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a program ended."""

    status: Literal["ok", "error", "limit"]
    """`ok`: exit status 0. `error`: another status, or a signal. `limit`: it was ended at one of its limits
    (exceeding memory, open files or the size of a file raises an error in the program itself)."""
    how: str
    """A description for the log."""
    stdout: str
    stderr: str
    """The last `MAX_STDERR_BYTES` bytes."""


def watched(process: subprocess.Popen[bytes], work: Path, limits: Limits) -> Outcome:
    """Reads the program's output until it ends or hits a limit. Raises `SandboxError` if the machine gives it
    no CPU time."""
    assert process.stdout is not None
    assert process.stderr is not None
    stdout, stderr, printed_bytes = bytearray(), bytearray(), 0
    over: str | None = None
    watch = _Watch(process.pid, work, limits)
    started_s, look_s = time.monotonic(), 0.0
    with (
        open(os.pidfd_open(process.pid), "rb", buffering=0) as ended,  # noqa: PTH123 - of a descriptor
        selectors.DefaultSelector() as selector,
    ):
        selector.register(ended, selectors.EVENT_READ)
        selector.register(process.stdout, selectors.EVENT_READ, stdout)
        selector.register(process.stderr, selectors.EVENT_READ, stderr)
        while selector.get_map() and over is None:
            for key, _ in selector.select(LOOK_S):
                if key.fileobj is not ended and (chunk := os.read(key.fd, 1 << 16)):
                    key.data.extend(chunk)
                    printed_bytes += len(chunk)
                else:
                    selector.unregister(key.fileobj)
            del stderr[:-MAX_STDERR_BYTES]
            now_s = time.monotonic()
            if printed_bytes > limits.output_bytes:
                over = f"more than {limits.output_bytes} bytes of output"
            elif now_s > look_s:
                over, look_s = watch.excess(now_s - started_s), now_s + LOOK_S
            if over is None and now_s - started_s > STARVED_S:
                raise SandboxError(
                    f"a program neither ended nor used up its CPU time in {STARVED_S:g} s; provide more cores"
                )
    if over is not None:
        process.kill()
    status, cpu_s = _reap(process)
    if over is None and (status == -signal.SIGXCPU or (status == -signal.SIGKILL and cpu_s > limits.cpu_s)):
        over = f"more than {math.ceil(limits.cpu_s)} s of CPU time"
    elif over is None and status == -signal.SIGKILL:
        raise SandboxError("the system killed a program within its limits; is the machine short of memory?")
    out, err = (bytes(text).decode(errors="replace") for text in (stdout[: limits.output_bytes], stderr))
    if over is not None:
        return Outcome("limit", over, out, err)
    if status < 0:
        return Outcome("error", f"killed by {signal.Signals(-status).name}", out, err)
    return Outcome("ok" if status == 0 else "error", f"exit status {status}", out, err)


def _reap(process: subprocess.Popen[bytes]) -> tuple[int, float]:
    """Exit status, and seconds of CPU time."""
    deadline_s = time.monotonic() + KILL_TIMEOUT_S
    while not (found := os.wait4(process.pid, os.WNOHANG))[0]:
        if time.monotonic() > deadline_s:
            raise SandboxError(f"process {process.pid} still exists {KILL_TIMEOUT_S:g} s after SIGKILL")
        time.sleep(0.001)
    _, status, used = found
    process.returncode = os.waitstatus_to_exitcode(status)
    return process.returncode, used.ru_utime + used.ru_stime


class _Watch:
    """Checks the limits that the kernel does not enforce."""

    def __init__(self, pid: int, work: Path, limits: Limits) -> None:
        self._tasks = Path(f"/proc/{pid}/task")
        self._work = work
        self._limits = limits
        self._busy_s = self._ended_s = 0.0
        self._busy_before_s = self._busy_until_now_s()

    def excess(self, elapsed_s: float) -> str | None:
        """The limit that is exceeded after `elapsed_s`, if any."""
        limits = self._limits
        if sum(1 for _ in self._tasks.iterdir()) > limits.threads:
            return f"more than {limits.threads} threads"
        if elapsed_s - (self._busy_until_now_s() - self._busy_before_s) > limits.idle_s:
            return f"more than {limits.idle_s:g} s of idling"
        sizes = []
        for entry in os.scandir(self._work):
            with suppress(FileNotFoundError):
                sizes.append(entry.stat(follow_symlinks=False).st_blocks * 512)
            if len(sizes) > limits.folder_files:
                return f"more than {limits.folder_files} files"
        if sum(sizes) > limits.folder_bytes:
            return f"more than {limits.folder_bytes} bytes of files"
        return None

    def _busy_until_now_s(self) -> float:
        """Seconds in which its threads, including ended ones, ran or waited for a core."""
        busy_ns = 0
        for file in self._tasks.glob("*/schedstat"):
            with suppress(FileNotFoundError, ProcessLookupError):  # it has just ended
                ran, waited, _ = file.read_text().split()
                busy_ns += int(ran) + int(waited)
        self._ended_s += max(0.0, self._busy_s - busy_ns / 1e9)
        self._busy_s = busy_ns / 1e9
        return self._ended_s + self._busy_s
