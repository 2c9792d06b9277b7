"""A process that ends with the one that started it."""

from __future__ import annotations

import os
import signal
import threading
import time

ORPHAN_POLL_S = 0.5
ORPHAN_GRACE_S = 5.0


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
