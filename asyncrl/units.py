"""Formats numbers for people. ASCII only, for output that can show nothing else."""

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


def format_bytes(n: float) -> str:
    """`n` bytes in the decimal unit that leaves 1 to 999 of it: `512 B`, `1.5 MB`."""
    value, units = float(n), ["B", "kB", "MB", "GB", "TB"]
    while value >= 999.95 and len(units) > 1:
        value /= 1000
        units.pop(0)
    return f"{value:.0f} B" if units[0] == "B" else f"{value:.1f} {units[0]}"
