"""A part of the analysis: the cells of one experiment, what is measured in a cell, and the claims that it decides."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pandas as pd

from analyses.ntk_isotropy.config import Config
from curvlab.study import Cell, Claim

PAPER = "Karakida & Osawa 2020"

Observations = Sequence[Mapping[str, object]]

Expectation = Literal["supported", "refuted", "open"]

TOLERANCE_FACTOR = 10.0
"""An identity holds if its error is below this times R·ε·κ, κ the condition number of what was solved."""


@dataclass(frozen=True)
class Part:
    """One experiment.

    Attributes:
        name: the coordinate `part` of its cells.
        cells: configuration to cells.
        measure: a cell to observations.
        claims: configuration to the claims that its measurements decide.
        seconds: estimated seconds of a cell, at a width.
    """

    name: str
    cells: Callable[[Config], Sequence[Cell]]
    measure: Callable[[Cell, Config], Observations]
    claims: Callable[[Config], Sequence[Claim]]
    seconds: Callable[[int], float]


def cells_of(part: str, config: Config, points: Iterable[Mapping[str, object]]) -> list[Cell]:
    """Return the cells of a part: each distinct point at every seed."""
    takes = config.takes
    base: dict[str, object] = {
        "part": part,
        "width": config.middle_width,
        "depth": config.depth if "depth" in takes else 0,
        "activation": config.activation if "activation" in takes else "",
        "outputs": 1 if "outputs" in takes else 0,
    }
    wanted: dict[Cell, None] = {}
    for point in points:
        if any(
            point.get(name, base[name]) != base[name] and name not in takes
            for name in ("depth", "activation", "outputs")
        ):
            continue
        for seed in range(config.seeds):
            wanted[Cell({**base, **point, "seed": seed})] = None
    return list(wanted)


def network(cell: Cell) -> tuple[str, ...]:
    """Return what determines a cell's network; cells that share it run side by side."""
    return tuple(
        str(cell.coordinates.get(name, "")) for name in ("width", "depth", "activation", "outputs", "loss", "seed")
    )


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


def identities(table: pd.DataFrame) -> pd.DataFrame:
    """Estimate of an identity: every observation with its own tolerance."""
    return table[["seed", "value", "tolerance"]]


def by_seed(table: pd.DataFrame) -> pd.DataFrame:
    """Estimate by the mean over a seed's observations."""
    return table.groupby("seed")["value"].mean().reset_index()


def worst_by_seed(table: pd.DataFrame) -> pd.DataFrame:
    """Estimate by the largest of a seed's observations."""
    return table.groupby("seed")["value"].max().reset_index()


def least_by_seed(table: pd.DataFrame) -> pd.DataFrame:
    """Estimate by the smallest of a seed's observations."""
    return table.groupby("seed")["value"].min().reset_index()


def at_largest_width(estimate: Callable[[pd.DataFrame], pd.DataFrame]) -> Callable[[pd.DataFrame], pd.DataFrame]:
    """Return the estimate from the widest networks only."""
    return lambda table: estimate(table[table["width"] == table["width"].max()])


def slope_by_seed(table: pd.DataFrame) -> pd.DataFrame:
    """Estimate by the slope of log value against log width, of each seed."""
    slopes = {
        seed: np.polyfit(np.log(group["width"].astype(float)), np.log(group["value"]), 1)[0]
        for seed, group in table.groupby("seed")
    }
    return pd.DataFrame({"seed": list(slopes), "value": list(slopes.values())})


def needs_several_widths(table: pd.DataFrame) -> str | None:
    """Say that a slope needs more than one width."""
    return None if len(set(table["width"])) > 1 else "A slope against width needs at least two widths (--widths)."
