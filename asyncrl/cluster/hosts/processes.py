"""Processes that a role has started: found by an environment variable that they inherit."""

from __future__ import annotations

import os
import signal
from collections.abc import Collection
from contextlib import suppress

import psutil

ROLE_TAG = "ASYNCRL_ROLE"
"""Environment variable by which all that a role has started, and that its own processes have started, is
known."""

DRAIN = signal.SIGUSR2
"""Asks a rollout worker to hand in what it is at, and take nothing more."""


def signal_group(pid: int, number: signal.Signals) -> None:
    """Send a signal to a process and to all that it has started in its own session."""
    with suppress(ProcessLookupError):  # all of it may be gone already
        os.killpg(pid, number)


def kill_tagged(tags: Collection[str]) -> None:
    """Kill every process of this user that carries one of these tags: what a role started may have sessions
    of its own and survive it."""
    for process in psutil.process_iter():
        try:
            if process.environ().get(ROLE_TAG) in tags:
                process.kill()
        except (psutil.AccessDenied, psutil.NoSuchProcess, psutil.ZombieProcess, OSError):
            continue  # another user's, or gone
