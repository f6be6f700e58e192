"""How things are drawn: a colour, a marker and a name each, the same in all figures."""

import warnings
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Protocol

from curvlab.tools.errors import CommandError


@dataclass(frozen=True)
class Look:
    """A colour, a marker and the name in legends."""

    color: str
    marker: str
    label: str


class Drawn(Protocol):
    """What has a look."""

    look: Look


REGISTRIES: list[Mapping[str, Drawn]] = []
"""Things that are drawn, by the keys that options and results use, in the order of legends; structures are, see
`curvlab.fisher.STRUCTURES`."""

WITHOUT_STRUCTURE = {"gradient-descent": Look("#7F7F7F", "*", "gradient descent")}
"""What stands beside structures, and after them in legends."""

SPARE: Mapping[str, tuple[str, ...]] = {
    "color": ("#44AA99", "#CC6677", "#332288", "#999933", "#6699CC", "#661100", "#117733", "#AA4499"),
    "marker": ("d", ">", "<"),
}
"""Colours and markers for things that bring none of their own; no structure of curvlab has them."""


def default_look(key: str) -> Look:
    """The look of what nobody has given one: a grey circle, and the key as its name."""
    return Look("#999999", "o", key)


def distinct(key: str, wanted: Look | None, others: Mapping[str, Look]) -> Look:
    """A look that can be told from those of others: the one that is wanted as far as it can, else what is spare.

    Warns:
        UserWarning: the colour or the marker that is wanted is that of another, which the message names.
    """
    found = wanted or default_look(key)
    taken = []
    for field, spare in SPARE.items():
        used = {getattr(look, field): other for other, look in others.items()}
        own = getattr(found, field)
        if wanted is not None and own not in used:
            continue
        changed = next((one for one in spare if one not in used), own)
        found = replace(found, **{field: changed})
        if wanted is not None:
            taken.append(f"{field} {own} is that of {used[own]!r}, so it is drawn with {changed}")
    if taken:
        warnings.warn(
            f"The look of {key!r}: its {'; its '.join(taken)}. Give it one of its own: look=Look(color, marker, label).",
            stacklevel=3,
        )
    return found


def look(key: str) -> Look:
    """The look of a key, `default_look` where nobody has given it one."""
    for things in REGISTRIES:
        with suppress(CommandError):
            return things[key].look
    return WITHOUT_STRUCTURE.get(key, default_look(key))


def in_order(keys: Iterable[str]) -> list[str]:
    """Keys in the order of legends, those without a place there last."""
    found = dict.fromkeys(keys)
    known = [key for things in (*REGISTRIES, WITHOUT_STRUCTURE) for key in things if key in found]
    return list(dict.fromkeys([*known, *found]))
