"""A part of an analysis: the cells of one experiment, what is measured in a cell, and the claims that it decides."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, Literal, TypeVar

from curvlab.study import Cell, Claim, CommonOptions

C = TypeVar("C", bound=CommonOptions)

Observations = Sequence[Mapping[str, object]]

Expectation = Literal["supported", "refuted", "open"]

TOLERANCE_FACTOR = 10.0
"""An identity holds if its error is below this times R·ε·κ, κ the condition number of what was solved."""


@dataclass(frozen=True)
class Part(Generic[C]):
    """One experiment.

    Attributes:
        name: the coordinate `part` of its cells.
        cells: configuration to cells.
        measure: a cell to observations.
        claims: configuration to the claims that its measurements decide.
        seconds: estimated seconds of a cell, at a width.
    """

    name: str
    cells: Callable[[C], Sequence[Cell]]
    measure: Callable[[Cell, C], Observations]
    claims: Callable[[C], Sequence[Claim]]
    seconds: Callable[[int], float]


def where(part: str, **coordinates: object) -> Callable[[Cell], bool]:
    """Return the test for cells of a part with given coordinates; a tuple lists the values allowed."""

    def test(cell: Cell) -> bool:
        if cell["part"] != part:
            return False
        for name, value in coordinates.items():
            allowed = value if isinstance(value, tuple) else (value,)
            if cell.coordinates.get(name) not in allowed:
                return False
        return True

    return test
