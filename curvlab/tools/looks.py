"""How things are drawn: a colour, a marker and a name each, the same in all figures."""

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Look:
    """A colour, a marker and the name in legends."""

    color: str
    marker: str
    label: str


LOOKS: dict[str, Look] = {}
"""By the key that options and results use, in the order of legends; every structure adds its own."""


def default_look(key: str) -> Look:
    """The look of what nobody has given one: a grey circle, and the key as its name."""
    return Look("#999999", "o", key)


WITHOUT_STRUCTURE = {"gradient-descent": Look("#7F7F7F", "*", "gradient descent")}
"""What stands beside structures, and after them in legends."""


def look(key: str) -> Look:
    """The look of a key, `plain` where nobody has given it one."""
    return (LOOKS | WITHOUT_STRUCTURE).get(key, default_look(key))


def in_order(keys: Iterable[str]) -> list[str]:
    """Keys in the order of legends, those without a look last."""
    found = list(dict.fromkeys(keys))
    known = [key for key in LOOKS | WITHOUT_STRUCTURE if key in found]
    return known + [key for key in found if key not in known]
