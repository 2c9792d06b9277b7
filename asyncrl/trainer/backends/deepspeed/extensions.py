"""The lock under which torch compiles DeepSpeed's extensions, for those that a killed process left behind."""

from __future__ import annotations

import logging
import os
import time
from pathlib import Path

from torch.utils.cpp_extension import get_default_build_root

from asyncrl.waits import waiting

log = logging.getLogger(__name__)

STALE_S = 300.0
"""Nothing here takes so long to compile, not even on a busy machine."""
POLL_S = 0.1


def wait_for_compilers() -> None:
    """Return once nobody compiles an extension.

    torch holds the lock as a file, which outlives its process, and itself waits for it to go without an end.
    One that is older than `STALE_S` is therefore taken away.
    """
    for lock in (*_root().glob("*/lock"), *_root().glob("*/*/lock")):
        with waiting(f"another process to compile {lock.parent.name} ({lock})"):
            _wait_for(lock)


def _root() -> Path:
    return Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root())


def _wait_for(lock: Path) -> None:
    try:
        while (age_s := time.time() - lock.stat().st_mtime) < STALE_S:
            time.sleep(POLL_S)
    except FileNotFoundError:
        return
    log.warning("%s is %.0f s old: whoever held it is gone; it is removed", lock, age_s)
    lock.unlink(missing_ok=True)
