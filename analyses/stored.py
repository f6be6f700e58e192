"""Cells on which other cells depend, such as the choice of a configuration: from the cache of a run, or measured here."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from analyses.part import C, Observations
from curvlab.study import Cell
from curvlab.study.cache import CellCache
from curvlab.study.measurements import Row, normalise


def stored_or_measured(
    cache: CellCache, cells: Iterable[Cell], measure: Callable[[Cell, C], Observations], config: C
) -> list[list[Row]]:
    """Return the observations of cells; those that the cache has not are measured, and kept there."""
    found = []
    for cell in cells:
        rows = None if config.fresh else cache.load(cell)
        if rows is None:
            rows = normalise(cell, measure(cell, config))
            cache.store(cell, rows)
        found.append(rows)
    return found
