"""An experiment: the cells that it measures, what is measured in one, and the claims that this decides."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, Literal

import pandas as pd

from curvlab.study.cache import CellCache
from curvlab.study.cells import Cell, matches, phrase
from curvlab.study.claims import Claim
from curvlab.study.measurements import Row, normalise, tabulate
from curvlab.study.options import C

Point = Mapping[str, object]
"""Coordinates of a cell, without its experiment; without a seed it is run at each of the configuration."""
Observations = Sequence[Mapping[str, object]]
"""What a cell shows: each with at least ``quantity`` and ``value``."""


@dataclass(frozen=True)
class Context(Generic[C]):
    """What the measurement of a cell may use besides its coordinates.

    Attributes:
        config: The configuration.
        cell: The cell that is measured.
        cache: Where finished cells are kept.
        before: The experiments that come before this cell's, with their planned cells.
    """

    config: C
    cell: Cell
    cache: CellCache
    before: Mapping[str, tuple[Measure[C], tuple[Cell, ...]]]

    def rows(self, experiment: str, **coordinates: object) -> pd.DataFrame:
        """What another experiment has measured, in long form; cells that nobody has measured yet are measured now.

        Args:
            experiment: One of those that this cell's experiment comes after.
            coordinates: Of the cells: a value, a tuple of those allowed, or a test of the value.

        Raises:
            LookupError: this cell's experiment does not come after that one, or no such cell is planned.
        """
        if experiment not in self.before:
            raise LookupError(
                f"experiment {self.cell['experiment']!r} reads what {experiment!r} measured; name that in its `after`"
            )
        measure, planned = self.before[experiment]
        wanted = [cell for cell in planned if matches(cell, coordinates)]
        if not wanted:
            raise LookupError(f"experiment {experiment!r} plans no cell with {phrase(coordinates)}")
        return tabulate({cell: self._stored(cell, measure) for cell in wanted})

    def _stored(self, cell: Cell, measure: Measure[C]) -> list[Row]:
        rows = self.cache.load(cell, of_this_run=self.config.fresh)
        if rows is None:
            rows = Context(self.config, cell, self.cache, self.before).measured(measure)
            self.cache.store(cell, rows)
        return rows

    def measured(self, measure: Measure[C]) -> list[Row]:
        """What a measurement shows of the cell, from its beginning if cells are to be computed again."""
        if self.config.fresh:
            self.checkpoint.unlink(missing_ok=True)
        return normalise(self.cell, measure(self.cell, self))

    @property
    def checkpoint(self) -> Path:
        """A file for the state of a long run of this cell, which lies beside the cache; it may exist already."""
        return self.cache.checkpoint(self.cell)


Varied = Literal["initialisation", "data", "split", "batches", "draws"]
Measure = Callable[[Cell, Context[C]], Observations]


@dataclass(frozen=True, kw_only=True)
class Experiment(Generic[C]):
    """One experiment of an analysis.

    Attributes:
        name: Its name, the coordinate ``experiment`` of its cells.
        cells: The points that it measures, or configuration → these.
        measure: One cell → its observations. It is a function of a module, or a `functools.partial` of one, so that
            processes can be sent it.
        varies: What a seed varies: the initialisation of the weights, the data, their split, their order in batches, or
            random draws of the method; or configuration → these. What it does not vary, its claims say nothing of.
        claims: Those that its measurements decide, fixed before anything is measured, or configuration → these.
        seconds: Estimated time of a cell, or a function of cell and configuration.
        memory: Estimated peak bytes of a cell, or a function of cell and configuration.
        after: Names of the experiments whose measurements it reads, by `Context.rows`; they are measured first.
    """

    name: str
    cells: Iterable[Point] | Callable[[C], Iterable[Point]]
    measure: Measure[C]
    varies: tuple[Varied, ...] | Callable[[C], tuple[Varied, ...]]
    claims: Sequence[Claim] | Callable[[C], Sequence[Claim]] = ()
    seconds: float | Callable[[Cell, C], float] = 1.0
    memory: float | Callable[[Cell, C], float] = 5e8
    after: tuple[str, ...] = ()

    def planned(self, config: C) -> list[Cell]:
        """Its cells: each distinct point at every seed of the configuration, unless the point has a seed of its own."""
        seeds = [{"seed": seed} for seed in config.seeds_run]
        found = {
            Cell({"experiment": self.name, **point, **seed}): None
            for point in (self.cells(config) if callable(self.cells) else self.cells)
            for seed in ([{}] if "seed" in point else seeds)
        }
        return list(found)

    def claimed(self, config: C) -> list[Claim]:
        """Its claims, each as one of this experiment."""
        varies = self.varies(config) if callable(self.varies) else self.varies
        return [
            claim.of(self.name, varies) for claim in (self.claims(config) if callable(self.claims) else self.claims)
        ]

    def resources(self, cell: Cell, config: C) -> tuple[float, float]:
        """Estimated seconds and peak bytes of a cell."""
        seconds, memory = (value(cell, config) if callable(value) else value for value in (self.seconds, self.memory))
        return seconds, memory
