"""The cells of a part of the training analysis."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import analyses.part
from analyses.training.config import Config
from curvlab.study import Cell

Part = analyses.part.Part[Config]


def cells_of(part: str, seeds: int, points: Iterable[Mapping[str, object]]) -> list[Cell]:
    """Return the cells of a part: each point at every seed."""
    return [Cell({"part": part, **point, "seed": seed}) for point in points for seed in range(seeds)]
