"""How processes end: with the one that started them, and at once."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
import time
from typing import NoReturn

ORPHAN_POLL_S = 0.5
ORPHAN_GRACE_S = 5.0
_PR_SET_PDEATHSIG = 1


def end_with(parent: int) -> None:
    """End this process when its parent (of this process id) is gone, however it went and however early: by
    SIGTERM, or hard after a grace time."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(ORPHAN_POLL_S)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(ORPHAN_GRACE_S)
        os._exit(1)

    threading.Thread(target=watch, name="lifeline", daemon=True).start()


def die_with(parent: int) -> None:
    """On Linux the kernel kills this process when its parent dies, even inside a C call that holds the GIL.
    Elsewhere nothing does."""
    if sys.platform != "linux":
        return
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
    if os.getppid() != parent:  # it died before the call
        os._exit(1)


def leave(status: int) -> NoReturn:
    """End this process. Not by sys.exit: a training step that is still computing in its thread must not hold
    up the end."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
