"""Faults for running jobs: each does to the real processes, files and connections what can befall them.

A fault is called with the running job and a source of randomness, once the moment has come. It knows nothing
of what AsyncRL does about it.
"""

from __future__ import annotations

import ctypes
import errno
import os
import random
import signal
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil
from launched import Launched

from asyncrl.runfiles.layout import RunDir
from asyncrl.weights.shm.segment import segment_path

Fault = Callable[[Launched, random.Random], None]

ORDERS = "orders.txt"
"""In the folder of the reward function: what its next call is to do."""

REWARD = '''
import os, time
from pathlib import Path

ORDERS = Path(__file__).with_name("orders.txt")

def obedient(completions, **_):
    """The share of the letter e; or what it is ordered to do, once."""
    order = None
    if ORDERS.exists():
        taken = ORDERS.with_suffix(f".{os.getpid()}")
        try:
            ORDERS.rename(taken)  # one of several processes takes it
            order = taken.read_text()
        except FileNotFoundError:
            pass
    if order == "hang":
        time.sleep(3600)
    if order == "nan":
        return [float("nan")] * len(completions)
    if order == "die":
        os.kill(os.getpid(), 9)
    texts = [c if isinstance(c, str) else c[-1]["content"] for c in completions]
    return [text.count("e") / max(1, len(text)) for text in texts]
'''
_PIDFD_GETFD = 438
_SLOW_S, _SLOW_TURN_S = 2.0, 0.05


def write_reward(folder: Path) -> str:
    """A reward function that takes orders; what `reward.functions.0.function` is to be."""
    path = folder / "obedient.py"
    path.write_text(REWARD)
    return f"{path}:obedient"


def kill(role: str) -> Fault:
    return lambda run, rng: _signal(run, role, signal.SIGKILL)


def pause(role: str) -> Fault:
    """For good: it moves no more, and does not end."""
    return lambda run, rng: _signal(run, role, signal.SIGSTOP)


def pause_shortly(role: str) -> Fault:
    def fault(run: Launched, rng: random.Random) -> None:
        _signal(run, role, signal.SIGSTOP)
        time.sleep(rng.uniform(0.1, 2.0))
        _signal(run, role, signal.SIGCONT)

    return fault


def slow(role: str) -> Fault:
    """Half as fast, for a while."""

    def fault(run: Launched, rng: random.Random) -> None:
        end_s = time.monotonic() + _SLOW_S
        while time.monotonic() < end_s:
            for number in (signal.SIGSTOP, signal.SIGCONT):
                _signal(run, role, number)
                time.sleep(_SLOW_TURN_S)

    return fault


def order(what: str) -> Fault:
    """The next call of the reward function hangs, gives NaN or kills its process."""

    def fault(run: Launched, rng: random.Random) -> None:
        aside = run.run_dir.parent / "orders.new"
        aside.write_text(what)
        aside.replace(run.run_dir.parent / ORDERS)

    return fault


def corrupt_weights(run: Launched, rng: random.Random) -> None:
    """Flip bits in the weights that lie in shared memory."""
    for buffer in (0, 1):
        path = segment_path(RunDir(run.run_dir).weights_prefix, buffer)
        if path.exists():
            with path.open("r+b") as file:
                for _ in range(16):
                    at = rng.randrange(path.stat().st_size)
                    file.seek(at)
                    byte = file.read(1)[0]
                    file.seek(at)
                    file.write(bytes([byte ^ 0xFF]))


def drop_messages(run: Launched, rng: random.Random) -> None:
    """Cut the connections of the coordinator, with whatever is under way on them. Nothing where it is being
    replaced just now."""
    for process in run.roles("coordinator"):
        with suppress(psutil.NoSuchProcess, ProcessLookupError):
            established = [c for c in process.net_connections("tcp") if c.status == psutil.CONN_ESTABLISHED]
            pidfd = os.pidfd_open(process.pid)
            try:
                for connection in established:
                    _shut_down(pidfd, connection.fd)
            finally:
                os.close(pidfd)


def _shut_down(pidfd: int, fd: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    ours = libc.syscall(_PIDFD_GETFD, pidfd, fd, 0)
    if ours < 0:
        error = ctypes.get_errno()
        if error in (errno.EBADF, errno.ESRCH):  # it was just closed
            return
        raise OSError(error, "pidfd_getfd failed")
    with socket.socket(fileno=ours) as end, suppress(OSError):  # it was just closed
        end.shutdown(socket.SHUT_RDWR)


def _signal(run: Launched, role: str, number: signal.Signals) -> None:
    """Nothing where the role is being replaced just now."""
    for process in run.roles(role):
        try:
            process.send_signal(number)
        except psutil.NoSuchProcess:
            continue


FAULTS: dict[str, Fault] = {
    "kill:rollout": kill("rollout-0"),
    "kill:trainer": kill("trainer-0"),
    "kill:coordinator": kill("coordinator"),
    "kill:reward": order("die"),
    "pause:rollout": pause("rollout-0"),
    "pause:trainer": pause("trainer-0"),
    "pause:coordinator": pause("coordinator"),
    "pause-shortly:coordinator": pause_shortly("coordinator"),
    "slow:engine": slow("rollout-0"),
    "hang:reward": order("hang"),
    "nan:reward": order("nan"),
    "corrupt:weights": corrupt_weights,
    "drop:message": drop_messages,
}
