"""Processes that vLLM starts must not outlive the rollout worker, however it ends."""

from __future__ import annotations

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def end_with_parent(parent: int) -> None:
    """Have the system kill this process when its parent (of process id `parent`) ends. Does nothing in a
    process with another parent, which will end it."""
    if sys.platform != "linux" or os.getppid() != parent:
        return
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # it has ended before the request took effect
        os._exit(1)
