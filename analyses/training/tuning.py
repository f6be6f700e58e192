"""Which configuration of a method is judged: the one that reaches the loss in the fewest steps from the tuning seed."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

from analyses.part import Observations
from analyses.stored import stored_or_measured
from analyses.training.config import Config
from analyses.training.methods import METHODS, described
from analyses.training.race import TUNING_SEED, race
from curvlab.study import Cell
from curvlab.study.cache import CellCache
from curvlab.study.execution import Plan
from curvlab.study.measurements import Row

NAME = "tuning"


def cell_of(method: str, index: int) -> Cell:
    """Return the cell of a configuration."""
    return Cell({"part": NAME, "method": method, "configuration": index})


def measure(cell: Cell, config: Config) -> Observations:
    """Run a configuration from the tuning seed."""
    method, index = METHODS[str(cell["method"])], int(cell["configuration"])
    trace, task = race(method, index, config, TUNING_SEED), config.task
    steps = trace.steps_to(lambda point: point.loss <= task.loss)
    return [
        {
            "quantity": "tuning_steps",
            "value": task.steps if steps is None else steps,
            "status": "ok" if steps is not None else "not reached",
            "point": described(method.points[index]),
        },
        {"quantity": "tuning_loss", "value": trace.final_loss, "status": trace.status},
    ]


def best(runs: Sequence[Sequence[Row]]) -> int:
    """Return the index of the configuration that comes first.

    Those that reached the loss and did not diverge afterwards come first, by their number of steps; then those that reached
    it and diverged; then by the final loss.

    Args:
        runs: observations of `measure`, one list a configuration.
    """

    def rank(run: Sequence[Row]) -> tuple[bool, bool, float, float]:
        steps, loss = run
        return steps["status"] != "ok", loss["status"] != "ok", float(steps["value"]), float(loss["value"])

    return min(range(len(runs)), key=lambda index: rank(runs[index]))


@lru_cache(maxsize=64)
def chosen(method: str, config: Config) -> int:
    """Return the index of a method's configuration; tuning runs come from the cache of cells, or are made here."""
    cells = [cell_of(method, index) for index in range(config.configurations)]
    return best(stored_or_measured(cache_of(config), cells, measure, config))


@lru_cache(maxsize=4)
def cache_of(config: Config) -> CellCache:
    """Return the cache in which the run of a configuration keeps its cells."""
    from analyses.training.analysis import ANALYSIS  # here, because the analysis is made of its parts

    return Plan.of(ANALYSIS, config).cache
