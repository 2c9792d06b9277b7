"""The deadline of the call that a reward function is answering."""

from __future__ import annotations

import time
from contextvars import ContextVar

ends_s: ContextVar[float | None] = ContextVar("ends_s", default=None)
"""On the monotonic clock; None outside a reward process."""


def left_s(otherwise: float) -> float:
    """Seconds until the deadline; `otherwise` if there is none."""
    end = ends_s.get()
    return otherwise if end is None else max(0.0, end - time.monotonic())
