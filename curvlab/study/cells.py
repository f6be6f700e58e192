"""A cell is the unit of work and of caching: one structure, width, seed, … of an analysis."""

import contextlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from curvlab.tools.storage import canonical

Scalar = str | int | float | bool

RESERVED = frozenset({"quantity", "value", "status", "cell"})
"""Columns of the measurements that no coordinate may be called."""


def scalar(value: object, where: str) -> Scalar:
    """``value`` as a plain Python scalar; NumPy scalars and one-element tensors are unwrapped.

    Raises:
        TypeError: anything else, named by ``where``.
    """
    unwrapped = value
    if hasattr(value, "item"):
        with contextlib.suppress(ValueError, RuntimeError):
            unwrapped = value.item()
    if not isinstance(unwrapped, str | int | float | bool):
        raise TypeError(f"{where} is a {type(value).__name__}; text, a number or a truth value is needed")
    return unwrapped


@dataclass(frozen=True, eq=False, init=False)
class Cell:
    """Coordinates of one piece of work, e.g. ``Cell({"structure": "full", "width": 128, "seed": 0})``.

    Two cells are equal if their canonical JSON, `key`, is.

    Raises:
        ValueError: a reserved or empty name, or a coordinate that is not finite.
        TypeError: a coordinate that is not a scalar.
    """

    coordinates: Mapping[str, Scalar]

    def __init__(self, coordinates: Mapping[str, object]) -> None:
        plain = {name: scalar(value, f"coordinate {name!r}") for name, value in coordinates.items()}
        for name, value in plain.items():
            if name in RESERVED or not name:
                raise ValueError(f"a coordinate cannot be called {name!r}; taken are {', '.join(sorted(RESERVED))}")
            if isinstance(value, float) and not math.isfinite(value):
                raise ValueError(f"coordinate {name!r} is {value}; coordinates are finite")
        object.__setattr__(self, "coordinates", plain)

    @classmethod
    def from_key(cls, key: str) -> "Cell":
        """The cell with this `key`."""
        return cls(json.loads(key))

    @cached_property
    def key(self) -> str:
        """Canonical JSON of the coordinates; the ``cell`` column of the measurements."""
        return canonical(self.coordinates)

    def __getitem__(self, name: str) -> Scalar:
        return self.coordinates[name]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Cell) and self.key == other.key

    def __hash__(self) -> int:
        return hash(self.key)

    def __str__(self) -> str:
        return ", ".join(f"{name}={value}" for name, value in self.coordinates.items())


def matches(cell: Cell, where: Mapping[str, object]) -> bool:
    """Whether a cell has given coordinates: each a value, a tuple of those allowed, or a test of the value."""
    return all(_allows(wanted, cell.coordinates.get(name)) for name, wanted in where.items())


def _allows(wanted: object, value: Scalar | None) -> bool:
    if callable(wanted):
        return bool(wanted(value))
    return value in wanted if isinstance(wanted, tuple) else value == wanted


def phrase(where: Mapping[str, object]) -> str:
    """Coordinates that are asked for, in words."""

    def wording(wanted: object) -> str:
        if callable(wanted):
            return "as it needs"
        return " or ".join(map(str, wanted)) or "none" if isinstance(wanted, tuple) else str(wanted)

    return ", ".join(f"{name} {wording(wanted)}" for name, wanted in where.items())
