"""Format bytes and durations, and draw a curve in one line of text."""

from __future__ import annotations

import math
from collections.abc import Sequence

_BLOCKS, _ASCII_LEVELS = "▁▂▃▄▅▆▇█", "_.-~=+*#"


def format_bytes(num_bytes: float) -> str:
    """Format bytes in decimal units, as for network speeds: 1 MB is 10^6 bytes."""
    value, units = float(num_bytes), ["B", "kB", "MB", "GB", "TB"]
    while value >= 999.95 and len(units) > 1:
        value /= 1000
        units.pop(0)
    return f"{value:.0f} B" if units[0] == "B" else f"{value:.1f} {units[0]}"


def format_duration(duration_s: float) -> str:
    """Format a duration: seconds, then minutes, then hours and minutes."""
    if duration_s < 9.95:
        return f"{duration_s:.1f} s"
    if duration_s < 120:
        return f"{duration_s:.0f} s"
    minutes = round(duration_s / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"


def sparkline(values: Sequence[float], *, ascii_only: bool = False) -> str:
    """Draw a curve in one line, a character for each finite value; the lowest is at the bottom."""
    levels = _ASCII_LEVELS if ascii_only else _BLOCKS
    finite = [value for value in values if math.isfinite(value)]
    if not finite:
        return ""
    low, span = min(finite), max(finite) - min(finite)
    if span == 0:
        return levels[0] * len(finite)
    return "".join(levels[round((value - low) / span * (len(levels) - 1))] for value in finite)
