"""The cells of a part of the acceleration analysis."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import analyses.part
from analyses.gnn_acceleration.config import Config
from curvlab.study import Cell

PAPER = "Xu, Zhang, Jegelka & Kawaguchi 2021"

Part = analyses.part.Part[Config]


def cells_of(part: str, config: Config, points: Iterable[Mapping[str, object]]) -> list[Cell]:
    """Return the cells of a part: each point at every seed."""
    return [Cell({"part": part, **point, "seed": seed}) for point in points for seed in range(config.seeds)]
