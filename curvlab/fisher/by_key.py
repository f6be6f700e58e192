"""Structures by key, class or as they are, and the keys that are taken where none is named."""

from __future__ import annotations

from inspect import signature
from typing import Any

from curvlab.errors import unknown_name
from curvlab.fisher.structure import STRUCTURES, Structure
from curvlab.tools.text import what_was_given


def make(key: str | type[Structure] | Structure, **options: Any) -> Structure:
    """Return a structure by its key in `STRUCTURES` or its class, with the options of its class; an object is returned as it is.

    Raises:
        ValueError: for an unknown key or option, with the nearest known one suggested, and for what is no structure.
    """
    if isinstance(key, Structure) and not options:
        return key
    made = STRUCTURES[key] if isinstance(key, str) else key
    if not (isinstance(made, type) and issubclass(made, Structure)):
        made_already = isinstance(key, Structure)
        what = "one that is made takes no further options" if made_already else f"got {what_was_given(key)}"
        raise ValueError(f"A structure is a key such as 'kfac', a class, or an object such as KFAC(); {what}.")
    known = signature(made).parameters
    for name in options:
        if name not in known:
            raise unknown_name(f"option of {getattr(made, 'key', made.__name__)!r}", name, known)
    return made(**options)


def of_theory() -> tuple[str, ...]:
    """Return the keys of all structures but those of optimisers: what analyses and comparisons take if none is named.

    Those of installed packages count as they are here; one that nobody has loaded counts as a structure of theory.
    """
    of_optimisers = {key for key, structure in STRUCTURES.loaded.items() if structure.of_optimiser}
    return tuple(key for key in STRUCTURES if key not in of_optimisers)
