"""Runs Python programs written by a model: each in its own process, which can compute, read its input, write
its output and write a few files in an empty folder, and nothing else.

| a program has | how |
|---|---|
| no network | seccomp: no sockets of any family |
| no child, no daemon | seccomp: no fork, and `clone` only for threads |
| no access to other processes | seccomp: no signals, no tracing, no access to their memory or limits |
| no files of the machine | Landlock: read the interpreter and its libraries, write one empty folder |
| no privileges, no keys | no capabilities, no environment, no descriptors of its parent |
| bounded time, memory, files | `Limits`: enforced by the kernel (rlimits), or watched from outside |

Both mechanisms belong to the kernel and need no privileges, namespaces or containers: Linux 5.13 or newer on
x86-64 or ARM64, with Landlock enabled. If one is missing, nothing runs (`SandboxError`); there is no weaker
sandbox. The program is a single process, so killing that is enough; it stays in its starter's process group,
is killed with the group, and dies with its parent.

It can see names, sizes and dates of files (`stat`), the host's name, and how busy the machine is.
"""

from __future__ import annotations

import json
import os
import platform
import selectors
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO

from asyncrl.reward.sandbox import confine
from asyncrl.reward.sandbox.limits import KILL_TIMEOUT_S, Limits, Outcome, SandboxError, watched
from asyncrl.reward.sandbox.seccomp import AUDIT_ARCH, filter_program
from asyncrl.scratch import scratch_folder

START_TIMEOUT_S = 60.0
"""Longest time for the interpreter to start; a busy machine may be slow."""

_LIBRARIES = (
    *("/lib", "/lib64", "/usr/lib", "/usr/lib64", "/usr/local/lib", "/etc/ld.so.cache"),
    *("/usr/share/zoneinfo", "/etc/localtime", "/dev/urandom", "/dev/zero"),
)
_PREFIXES = {sys.prefix, sys.base_prefix, sys.exec_prefix, sys.base_exec_prefix}


def check() -> None:
    """Raise `SandboxError` where this machine cannot confine a program, and say what is missing."""
    machine = platform.machine()
    if sys.platform != "linux" or machine not in AUDIT_ARCH:
        raise SandboxError(
            f"programs written by a model run only on Linux on {' or '.join(AUDIT_ARCH)}, and this is "
            f"{sys.platform} on {machine}; use such a machine, or a container"
        )
    if not confine.has_seccomp(machine):
        raise SandboxError("programs written by a model cannot run: this kernel has no seccomp filters")
    if not confine.landlock_abi():
        raise SandboxError(
            "programs written by a model cannot run: this kernel offers no Landlock, which protects the "
            "machine's files; use Linux 5.13 or newer with `landlock` in the kernel parameter lsm="
        )


def run_program(source: str, stdin: str = "", limits: Limits | None = None) -> Outcome:
    """Run a Python program until it ends or reaches one of its `limits`.

    It runs in this interpreter, with its installed packages, on one thread unless it starts more. The same
    program prints the same for the same input: sets always have the same order. Raises `SandboxError`.
    """
    _try_out()
    return _run(source, stdin, limits or Limits())


@cache
def _try_out() -> None:
    """Once per process: if the interpreter did not run in the sandbox, every program would fail."""
    check()
    outcome = _run("print(input())", "ok", Limits())
    if outcome.stdout != "ok\n":
        raise SandboxError(
            f"{sys.executable} does not run in the sandbox: {outcome.how}\n{outcome.stderr}".strip()
        )


def _run(source: str, stdin: str, limits: Limits) -> Outcome:
    with scratch_folder() as folder:
        work = folder / "work"
        work.mkdir()
        (folder / "program.py").write_text(source, "utf-8", "replace")
        (folder / "stdin").write_text(stdin, "utf-8", "replace")
        with _started(folder, work, limits) as process:
            return watched(process, work, limits)


@contextmanager
def _started(folder: Path, work: Path, limits: Limits) -> Iterator[subprocess.Popen[bytes]]:
    """The program's process, from its first instruction on; killed at the end."""
    reader, writer = os.pipe()
    plan = json.dumps(_plan(folder, work, limits, writer))
    with os.fdopen(reader, "rb") as report, (folder / "stdin").open("rb") as stdin:
        try:
            process = subprocess.Popen(
                [sys.executable, "-I", "-S", confine.__file__, plan],
                stdin=stdin,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                env={},
                pass_fds=(writer,),
            )
        finally:
            os.close(writer)
        assert process.stdout is not None
        assert process.stderr is not None
        with process.stdout, process.stderr:
            try:
                said = _read_report(report)
                if said != confine.STARTED:
                    raise SandboxError(
                        f"the sandbox did not start: {said.decode(errors='replace') or 'its process died'}"
                    )
                yield process
            finally:
                process.kill()
                process.wait(KILL_TIMEOUT_S)


def _plan(folder: Path, work: Path, limits: Limits, report: int) -> dict[str, Any]:
    """Instructions for `asyncrl.reward.sandbox.confine`."""
    plan = plan_of_fork()
    return plan | {
        "report": report,
        "folder": str(work),
        "limits": limits.for_kernel(),
        "readable": [*plan["readable"], str(folder / "program.py")],
        "usable": [str(work), os.devnull],
        # Isolated as by -I, except for one variable: the order of sets must always be the same.
        "command": [sys.executable, "-P", "-s", str(folder / "program.py")],
        "environment": {
            "PYTHONHASHSEED": "0",
            "PYTHONUTF8": "1",
            "PYTHONDONTWRITEBYTECODE": "1",
            "HOME": str(work),
            "TMPDIR": str(work),
            "LANG": "C.UTF-8",
            "OMP_NUM_THREADS": "1",
            "OPENBLAS_NUM_THREADS": "1",
        },
    }


def plan_of_fork() -> dict[str, Any]:
    """For `confine_fork` in a child of this process. Raises `SandboxError`."""
    check()
    return {
        "parent": os.getpid(),
        "folder": "/",
        "limits": {"RLIMIT_CORE": (0, 0)},
        "readable": [*_LIBRARIES, *_interpreter()],
        "usable": [],
        "filter": filter_program(platform.machine()).hex(),
    }


def confine_fork(plan: dict[str, Any], descriptor: int) -> None:
    """From here on, this process has what a program has, but for the folder. Its time and memory are for its
    parent to limit. It keeps one descriptor, and its outputs."""
    os.environ.clear()
    for first, end in ((3, descriptor), (descriptor + 1, os.sysconf("SC_OPEN_MAX"))):
        os.closerange(first, end)
    confine.confine(plan)


def _interpreter() -> Iterator[str]:
    """Files of this interpreter: itself and its libraries, not everything in its folder."""
    yield from (sys.executable, str(Path(sys.executable).resolve()))
    for prefix in _PREFIXES:
        yield from (f"{prefix}/{name}" for name in ("lib", "lib64", "pyvenv.cfg"))


def _read_report(report: BinaryIO) -> bytes:
    """What the child reports before it becomes the program, which closes the pipe."""
    deadline_s = time.monotonic() + START_TIMEOUT_S
    said = b""
    with selectors.DefaultSelector() as selector:
        selector.register(report, selectors.EVENT_READ)
        while selector.select(max(0.0, deadline_s - time.monotonic())):
            chunk = os.read(report.fileno(), 4096)
            if not chunk:
                return said
            said += chunk
    raise SandboxError(f"the sandbox did not start: no interpreter within {START_TIMEOUT_S:g} s")
