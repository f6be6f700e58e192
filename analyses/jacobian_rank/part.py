"""The cells of a part of the Jacobian-rank analysis."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import analyses.part
from analyses.jacobian_rank.config import Config
from curvlab.study import Cell

PAPER = "Zhang, Martens & Grosse 2019"

SYNTHETIC = "synthetic-two-layer"
"""Random inputs, more samples than dimensions, and a similarity that sets λ_min of the kernel."""

Part = analyses.part.Part[Config]


def cells_of(part: str, config: Config, points: Iterable[Mapping[str, object]]) -> list[Cell]:
    """Return the cells of a part: each distinct point that the problem can take, at every seed."""
    wanted: dict[Cell, None] = {}
    for point in points:
        problem = str(point.get("problem", config.problem))
        base: dict[str, object] = {"part": part, "problem": problem}
        if problem == config.problem:
            fixed = {name for name in ("width", "activation", "samples") if name not in config.takes}
            base |= {"samples": config.samples}
            base |= dict.fromkeys(fixed & {"width", "samples"}, 0)
            point = {name: value for name, value in point.items() if name not in fixed}
        for seed in range(config.seeds):
            wanted[Cell({**base, **point, "seed": seed})] = None
    return list(wanted)
