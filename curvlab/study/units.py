"""Durations, sizes and numbers as people read them."""

import math


def duration(seconds: float | int) -> str:
    """A time in seconds as text: ``0.4 s``, ``2 min 05 s``, ``3 h 20 min``."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes == 0:
        return f"{rest} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


def size(amount: float | int) -> str:
    """A number of bytes as text, in powers of 1024."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if amount < 1024:
            return f"{amount:.0f} B" if unit == "B" else f"{amount:.1f} {unit}"
        amount /= 1024
    return f"{amount:.1f} TiB"


def number(value: float, digits: int = 4) -> str:
    """So many significant digits; a dash where there is no number."""
    return "–" if math.isnan(value) else f"{value:.{digits}g}"
