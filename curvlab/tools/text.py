"""Durations, sizes, numbers and names as people read and write them."""

import math
import re
from collections.abc import Iterable
from difflib import get_close_matches

UNITS = {"B": 0, "KiB": 10, "MiB": 20, "GiB": 30, "TiB": 40}
"""Binary logarithms of the units in which memory is given."""


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


def as_bytes(memory: int | str) -> int:
    """Read an amount of memory, such as "512MiB".

    Raises:
        ValueError: it is not a positive number of bytes.
    """
    found = re.fullmatch(r"(\d+(?:\.\d*)?) *([KMGT]iB|B)", str(memory).strip()) if isinstance(memory, str) else None
    amount = float(found[1]) * 2.0 ** UNITS[found[2]] if found else memory
    if isinstance(amount, str) or not amount >= 1:
        raise ValueError(
            f"memory is a number of bytes or text such as '2GiB' (units {', '.join(UNITS)}), got {memory!r}."
        )
    return int(amount)


def number(value: float, digits: int = 4) -> str:
    """So many significant digits; a dash where there is no number."""
    return "–" if math.isnan(value) else f"{value:.{digits}g}"


def capitalised(text: str) -> str:
    """A text that begins with a capital letter; all other letters stay as they are."""
    return text[:1].upper() + text[1:]


def what_was_given(thing: object) -> str:
    """What somebody gave instead of something else, such as ``a list`` or ``the class Linear``."""
    return f"the class {thing.__name__}" if isinstance(thing, type) else f"a {type(thing).__name__}"


def as_names(names: str | Iterable[str], what: str) -> tuple[str, ...]:
    """Read names: one, or several.

    Args:
        names: as the user gave them.
        what: they are, in messages.

    Raises:
        ValueError: they are no text.
    """
    found = (names,) if isinstance(names, str) or not isinstance(names, Iterable) else tuple(names)
    strange = next((name for name in found if not isinstance(name, str)), None)
    if strange is not None:
        raise ValueError(f"{what} holds names, such as 'head', got {what_was_given(strange)}.")
    return found


def nearest(name: str, known: Iterable[str]) -> str:
    """A question for the known name nearest to ``name``, and a space; empty if none is near. Case does not matter."""
    by_lower = {one.lower(): one for one in known}
    close = get_close_matches(name.lower(), tuple(by_lower), n=1)
    return f"Did you mean {by_lower[close[0]]!r}? " if close else ""


def suggestion(name: str, known: Iterable[str]) -> str:
    """A sentence that names the known name nearest to ``name``, left out if none is near, then all known ones."""
    known = tuple(known)
    return f"{nearest(name, known)}Known: {', '.join(known) or 'none'}."


def unknown(what: str, name: str, known: Iterable[str]) -> str:
    """What an error says about an unknown name: what it was meant to be, and the nearest known one."""
    return f"Unknown {what} {name!r}. {suggestion(name, known)}"
