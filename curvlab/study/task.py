"""Measuring one cell, in whichever process: store what it gives, and tell what became of it."""

import logging
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Generic

import torch

from curvlab.study.cache import CellCache
from curvlab.study.cells import Cell
from curvlab.study.experiment import Context, Measure
from curvlab.study.faults import MemoryShortage
from curvlab.study.measurements import Row, faults, locate, records, tabulate
from curvlab.study.options import C
from curvlab.tools.errors import CommandError, DataUnavailable
from curvlab.tools.text import duration

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Attempt:
    """What became of one cell.

    Attributes:
        cell: The cell.
        note: In words, for the progress.
        trouble: Whether that is trouble, which is always shown.
        rows: Its observations; None if it failed.
        reason: Why it failed.
        shortage: The error, if it says that memory or data are missing.
        out_of_memory: Whether it failed because an allocation did.
        logged: What was logged meanwhile, if that was in another process.
    """

    cell: Cell
    note: str
    trouble: bool
    rows: list[Row] | None = None
    reason: str = ""
    shortage: CommandError | None = None
    out_of_memory: bool = False
    logged: tuple[logging.LogRecord, ...] = ()

    @classmethod
    def failed(
        cls, cell: Cell, reason: str, *, shortage: CommandError | None = None, out_of_memory: bool = False
    ) -> "Attempt":
        """A failure."""
        return cls(cell, f"failed: {reason}", True, reason=reason, shortage=shortage, out_of_memory=out_of_memory)


@dataclass(frozen=True)
class Task(Generic[C]):
    """Measures cells of one configuration and stores each as soon as it is finished.

    Attributes:
        measures: What measures a cell, by experiment.
        before: For every experiment those whose measurements it reads, with their cells.
        config: The configuration.
        cache: Where finished cells are kept.
    """

    measures: Mapping[str, Measure[C]]
    before: Mapping[str, Mapping[str, tuple[Cell, ...]]]
    config: C
    cache: CellCache

    def observe(self, cell: Cell) -> list[Row]:
        """Measure one cell.

        Raises:
            Exception: what the measurement raises.
        """
        experiment = str(cell["experiment"])
        before = {name: (self.measures[name], cells) for name, cells in self.before[experiment].items()}
        return Context(self.config, cell, self.cache, before).measured(self.measures[experiment])

    def __call__(self, cell: Cell) -> Attempt:
        """Measure one cell; an exception becomes an outcome.

        Raises:
            StorageFull: the finished cell cannot be stored.
        """
        start = time.perf_counter()
        try:
            rows = self.observe(cell)
        except Exception as error:
            log.exception("cell %s failed", cell)
            shortage = error if isinstance(error, MemoryShortage | DataUnavailable) else None
            reason = f"{type(error).__name__}: {error}"
            return Attempt.failed(cell, reason, shortage=shortage, out_of_memory=_out_of_memory(error))
        self.cache.store(cell, rows)
        took = duration(time.perf_counter() - start)
        log.info("cell %s: %d observations in %s", cell, len(rows), took)
        nonfinite = _nonfinite(cell, rows)
        for where in nonfinite:
            log.warning("non-finite value: %s", where)
        note = f"{took}, non-finite: {nonfinite[0]}" if nonfinite else took
        return Attempt(cell, note, bool(nonfinite), rows)


def _nonfinite(cell: Cell, rows: Sequence[Row]) -> list[str]:
    """Where the observations are non-finite and not declared to be."""
    suspects = [row for row in rows if not math.isfinite(float(row["value"]))]
    if not suspects:
        return []
    table = tabulate({cell: suspects})
    return [locate(row) for row in records(table[faults(table)])]


def _out_of_memory(error: Exception) -> bool:
    """Whether an allocation failed; torch's allocator for the CPU raises a RuntimeError."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)
