"""When the call that a reward function is answering will be ended."""

from __future__ import annotations

import time
from contextvars import ContextVar

ends_s: ContextVar[float | None] = ContextVar("ends_s", default=None)
"""By the monotonic clock; None outside of a reward process."""


def left_s(otherwise: float) -> float:
    """Seconds until then; `otherwise` where nobody ends it."""
    end = ends_s.get()
    return otherwise if end is None else max(0.0, end - time.monotonic())
