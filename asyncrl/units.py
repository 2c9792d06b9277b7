"""Formats numbers for people."""


def format_bytes(n: float) -> str:
    """`n` bytes in the decimal unit that leaves 1 to 999 of it: `512 B`, `1.5 MB`."""
    value, units = float(n), ["B", "kB", "MB", "GB", "TB"]
    while value >= 999.95 and len(units) > 1:
        value /= 1000
        units.pop(0)
    return f"{value:.0f} B" if units[0] == "B" else f"{value:.1f} {units[0]}"
