"""Which configuration of a method is judged: the one that classifies the most validation nodes right.

Every configuration runs from seeds that no judged run has; its validation accuracy at the epoch of the lowest validation
loss is averaged over them, and of equal ones the loss decides.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

from analyses.gnn_natural_gradient.config import Config
from analyses.gnn_natural_gradient.part import VALIDATION, VALIDATION_LOSS, reduced, run
from analyses.gnn_natural_gradient.recipe import METHODS, Recipe
from analyses.part import Observations
from analyses.stored import stored_or_measured
from curvlab.study import Cell
from curvlab.study.cache import CellCache
from curvlab.study.execution import Plan
from curvlab.study.measurements import Row

NAME = "tuning"
FIRST_START = 1000
"""Seed of the first run of a configuration; judged runs have seeds from 0."""


def cells_of_method(method: str, split: str, config: Config) -> list[Cell]:
    """Return the cells of a method's configurations, start by start."""
    return [
        Cell({"part": NAME, "method": method, "split": split, "configuration": index, "start": FIRST_START + start})
        for index in range(config.configurations)
        for start in range(config.starts)
    ]


def measure(cell: Cell, config: Config) -> Observations:
    """Run a configuration from one start."""
    recipe = METHODS[str(cell["method"])].recipes[int(cell["configuration"])]
    rows = reduced(run(recipe, config, str(cell["split"]), int(cell["start"])))
    return [row | {"quantity": f"tuning_{row['quantity']}", "recipe": str(recipe)} for row in rows]


def best(runs: Sequence[Sequence[Sequence[Row]]]) -> int:
    """Return the index of the configuration that comes first; those that diverged come last.

    Args:
        runs: observations of `measure`, by configuration and start.
    """

    def rank(starts: Sequence[Sequence[Row]]) -> tuple[int, float, float]:
        def total(name: str) -> float:
            return sum(float(row["value"]) for rows in starts for row in rows if row["quantity"] == f"tuning_{name}")

        diverged = sum(rows[0]["status"] != "ok" for rows in starts)
        return diverged, -round(total(VALIDATION), 9), total(VALIDATION_LOSS)

    return min(range(len(runs)), key=lambda index: rank(runs[index]))


@lru_cache(maxsize=64)
def selected(method: str, split: str, config: Config) -> Recipe:
    """Return a method's configuration on a split; tuning runs come from the cache of cells, or are made here."""
    rows = stored_or_measured(cache_of(config), cells_of_method(method, split, config), measure, config)
    starts = config.starts
    runs = [rows[start : start + starts] for start in range(0, len(rows), starts)]
    return METHODS[method].recipes[best(runs)]


@lru_cache(maxsize=4)
def cache_of(config: Config) -> CellCache:
    """Return the cache in which the run of a configuration keeps its cells."""
    from analyses.gnn_natural_gradient.analysis import ANALYSIS  # here, because the analysis is made of its parts

    return Plan.of(ANALYSIS, config).cache
