"""The child's side of the sandbox: drops whatever a program must not have, then becomes the program. It is
run by its path in an isolated interpreter, so it imports only the standard library.

`asyncrl.reward.sandbox.sandbox` explains the purpose; the numbers come from <linux/prctl.h>,
<linux/landlock.h> and <linux/capability.h>.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import resource
import signal
import struct
import sys
from pathlib import Path
from typing import Any

STARTED = b"started"
"""Sent to the parent when the process is confined. Anything else is the reason why it could not be."""

_PR_SET_PDEATHSIG, _PR_SET_SECCOMP, _PR_SET_NO_NEW_PRIVS = 1, 22, 38
_SECCOMP_MODE_FILTER = 2
_SYS_SECCOMP = {"x86_64": 317, "aarch64": 277}
_SECCOMP_GET_ACTION_AVAIL, _SECCOMP_RET_ERRNO = 2, 0x00050000
_LINUX_CAPABILITY_VERSION_3 = 0x20080522

_LANDLOCK_CREATE, _LANDLOCK_ADD_RULE, _LANDLOCK_RESTRICT_SELF = 444, 445, 446
_LANDLOCK_ABI = 1
_PATH_BENEATH = 1
_EXECUTE, _WRITE_FILE, _READ_FILE, _READ_DIR, _REMOVE_FILE, _MAKE_REG = (1 << i for i in (0, 1, 2, 3, 5, 8))
_TRUNCATE = 1 << 14
_RIGHTS = {1: 13, 2: 14, 3: 15, 5: 16}
"""Number of file rights that Landlock knows, from each of its versions on."""

READ = _EXECUTE | _READ_FILE | _READ_DIR
USE = READ | _WRITE_FILE | _REMOVE_FILE | _MAKE_REG | _TRUNCATE
"""Files, but no folders, links, sockets or devices."""

_libc = ctypes.CDLL(None, use_errno=True)


def landlock_abi() -> int:
    """The version of Landlock that the kernel offers; 0 where it offers none."""
    return int(max(0, _libc.syscall(_LANDLOCK_CREATE, None, ctypes.c_size_t(0), _LANDLOCK_ABI)))


def has_seccomp(machine: str) -> bool:
    action = ctypes.c_uint32(_SECCOMP_RET_ERRNO)
    call = _SYS_SECCOMP[machine]
    return bool(_libc.syscall(call, _SECCOMP_GET_ACTION_AVAIL, 0, ctypes.byref(action)) == 0)


def main() -> None:
    plan = json.loads(sys.argv[1])
    os.set_inheritable(plan["report"], False)  # closed when the program starts
    try:
        confine(plan)
        os.write(plan["report"], STARTED)
        os.execve(plan["command"][0], plan["command"], plan["environment"])
    except OSError as error:
        os.write(plan["report"], f"{error}".encode())
        os._exit(1)


def confine(plan: dict[str, Any]) -> None:
    """Raises `OSError` if the kernel refuses something."""
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != plan["parent"]:  # it died before the call
        os._exit(1)
    with contextlib.suppress(OSError):  # containers may not allow it; the system then chooses by size
        Path("/proc/self/oom_score_adj").write_text("1000")
    os.chdir(plan["folder"])
    os.umask(0o077)
    for name, limits in plan["limits"].items():
        _limit(getattr(resource, name), *limits)
    _prctl(_PR_SET_NO_NEW_PRIVS, 1)
    _drop_capabilities()
    _restrict_files(dict.fromkeys(plan["readable"], READ) | dict.fromkeys(plan["usable"], USE))
    _filter_calls(bytes.fromhex(plan["filter"]))


def _limit(which: int, soft: int, hard: int) -> None:
    _, highest = resource.getrlimit(which)
    if highest != resource.RLIM_INFINITY:  # our own hard limit, which cannot be raised
        soft, hard = min(soft, highest), min(hard, highest)
    resource.setrlimit(which, (soft, hard))


def _drop_capabilities() -> None:
    """Root's capabilities. Without new privileges, starting a program does not restore them."""
    header = struct.pack("<Ii", _LINUX_CAPABILITY_VERSION_3, 0)
    _checked(_libc.capset(header, bytes(24)), "capset")


def _restrict_files(granted: dict[str, int]) -> None:
    """Allow only files below the paths of `granted`, each with its rights. Missing paths are skipped."""
    abi = landlock_abi()
    known = (1 << max(n for version, n in _RIGHTS.items() if version <= max(1, abi))) - 1
    handled = struct.pack("<Q", known)
    ruleset = _libc.syscall(_LANDLOCK_CREATE, handled, ctypes.c_size_t(len(handled)), 0)
    _checked(ruleset, "landlock_create_ruleset")
    for path, rights in granted.items():
        try:
            fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
        except (FileNotFoundError, NotADirectoryError):
            continue
        if not Path(path).is_dir():
            rights &= _EXECUTE | _READ_FILE | _WRITE_FILE | _TRUNCATE
        rule = struct.pack("<Qi", rights & known, fd)
        code = _libc.syscall(_LANDLOCK_ADD_RULE, ruleset, _PATH_BENEATH, rule, 0)
        _checked(code, f"landlock_add_rule for {path}")
        os.close(fd)
    _checked(_libc.syscall(_LANDLOCK_RESTRICT_SELF, ruleset, 0), "landlock_restrict_self")
    os.close(ruleset)


def _filter_calls(program: bytes) -> None:
    """From here on, allow only the system calls that the filter accepts."""
    code = ctypes.create_string_buffer(program, len(program))
    argument = struct.pack("@HP", len(program) // 8, ctypes.addressof(code))
    _checked(_libc.prctl(_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, argument, 0, 0), "seccomp filter")


def _prctl(option: int, value: int) -> None:
    _checked(_libc.prctl(option, value, 0, 0, 0), f"prctl({option})")


def _checked(code: int, what: str) -> int:
    if code < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
    return code


if __name__ == "__main__":
    main()
