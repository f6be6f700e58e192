"""The cells of a part of the isotropy analysis."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import analyses.part
from analyses.ntk_isotropy.config import Config
from curvlab.study import Cell

PAPER = "Karakida & Osawa 2020"

Part = analyses.part.Part[Config]


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
