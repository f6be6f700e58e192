"""The cells of a part of the edge-of-stability analysis, and what its claims share."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import pandas as pd

import analyses.part
from analyses.edge_of_stability.config import Config
from analyses.estimates import by_seed
from curvlab.study import Cell

PAPER = "Cohen et al. 2021"

Part = analyses.part.Part[Config]

REACHED = "reached"
"""Quantity: whether a run reached its threshold, 1 or 0."""
BAND = 0.1
"""Half width of the band about the threshold that counts as hovering there. The paper's README run stays 1.5 to 6.5 % above."""


def cells_of(part: str, config: Config, points: Iterable[Mapping[str, object]]) -> list[Cell]:
    """Return the cells of a part: each distinct point at every seed."""
    wanted: dict[Cell, None] = {}
    for point in points:
        for seed in range(config.seeds):
            wanted[Cell({"part": part, "problem": config.problem, **point, "seed": seed})] = None
    return list(wanted)


def of(quantity: str) -> Callable[[pd.DataFrame], pd.DataFrame]:
    """Return the estimate by a seed's mean of one quantity, where the claim reads others for its assumptions."""
    return lambda table: by_seed(table[table["quantity"] == quantity])


def must_reach(table: pd.DataFrame) -> str | None:
    """Say that no run reached its threshold; a seed that did not, where others did, leaves the claim inconclusive."""
    reached = table.loc[table["quantity"] == REACHED, "value"]
    if reached.any():
        return None
    return f"None of {len(reached)} runs reached its threshold."
