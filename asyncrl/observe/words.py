"""Formats numbers for people. ASCII only, for output that can show nothing else."""

from __future__ import annotations

import math


def duration(seconds: float) -> str:
    """`0:07`, `12:34`, `3:01:02`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def percent(share: float) -> str:
    """`12%`; a dash for NaN."""
    return "-" if math.isnan(share) else f"{100 * share:.0f}%"


def number(value: float, digits: int = 0) -> str:
    """`12,345.6`; a dash for NaN."""
    return "-" if math.isnan(value) else f"{value:,.{digits}f}"


def milliseconds(seconds: float) -> str:
    """`4.2 ms`, `140 ms`; a dash for NaN."""
    return f"{number(1000 * seconds, 1 if seconds < 0.01 else 0)} ms"
