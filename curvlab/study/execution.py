"""Which cells a run has to measure, and measuring them so that nothing finished is ever lost."""

import logging
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Generic

import torch

from curvlab.study.analysis import Analysis
from curvlab.study.cache import CellCache
from curvlab.study.cells import Cell
from curvlab.study.claims import Claim, Failure
from curvlab.study.environment import available_memory, check_device
from curvlab.study.faults import DataUnavailable, MemoryShortage, StudyError, UsageError
from curvlab.study.measurements import Row, faults, locate, normalise, records, tabulate
from curvlab.study.options import C, nearest, recorded, share
from curvlab.study.progress import Advance
from curvlab.study.units import duration, size

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Plan(Generic[C]):
    """What one run does: its claims, its cells (its share of them under ``--shard``) and their cache."""

    analysis: Analysis[C]
    config: C
    claims: tuple[Claim, ...]
    cells: tuple[Cell, ...]
    data: str
    cache: CellCache

    @classmethod
    def of(cls, analysis: Analysis[C], config: C) -> "Plan[C]":
        """The plan of a configuration.

        Raises:
            UsageError: an unknown claim, or a device that cannot be used.
            DataUnavailable: from the analysis.
            ValueError: the analysis has two claims or two cells of the same name.
        """
        check_device(config.device)
        claims = tuple(analysis.claims(config))
        cells = tuple(analysis.cells(config))
        for what, names in (("claims", [c.id for c in claims]), ("cells", [c.key for c in cells])):
            if repeated := {name for name, count in Counter(names).items() if count > 1}:
                raise ValueError(f"{analysis.name} has {what} that are called the same: {', '.join(sorted(repeated))}")
        if config.claims:
            known = {claim.id: claim for claim in claims}
            for name in config.claims:
                if name not in known:
                    raise UsageError(f"--claims: {nearest(name, known, 'claim')}")
            claims = tuple(claim for claim in claims if claim.id in config.claims)
            cells = tuple(cell for cell in cells if any(claim.needs(cell) for claim in claims))
        if config.shard:
            index, total = share(config.shard)
            cells = cells[index - 1 :: total]
        data = analysis.data_hash(config)
        left_out = {"seeds", "claims", *analysis.axes}
        context = {
            "analysis": analysis.name,
            "version": analysis.version,
            "config": {name: value for name, value in recorded(config).items() if name not in left_out},
            "data": data,
        }
        cache = CellCache(config.results / ".cache" / analysis.name, context)
        return cls(analysis, config, claims, cells, data, cache)

    def cached(self) -> dict[Cell, list[Row]]:
        """The cells that need no work, with their observations; none under ``--fresh``."""
        if self.config.fresh:
            return {}
        loaded = ((cell, self.cache.load(cell)) for cell in self.cells)
        return {cell: rows for cell, rows in loaded if rows is not None}

    def estimate(self, cells: Sequence[Cell]) -> tuple[float, float, Cell | None]:
        """Seconds for ``cells``, bytes for the largest of them, and which that is."""
        needs = [(*self.analysis.resources(cell, self.config), cell) for cell in cells]
        if not needs:
            return 0.0, 0.0, None
        largest = max(needs, key=lambda need: need[1])
        return sum(seconds for seconds, _, _ in needs), largest[1], largest[2]


@dataclass
class Measured:
    """What became of the cells of a plan.

    Attributes:
        rows: Observations of the cells that have them.
        failures: The cells that were tried in vain.
        shortage: The first failure that more memory or more data would cure.
        interrupted: Whether the run was stopped before every cell had been tried.
    """

    rows: dict[Cell, list[Row]]
    failures: list[Failure] = field(default_factory=list)
    shortage: StudyError | None = None
    interrupted: bool = False


def measure(plan: Plan[C], cached: dict[Cell, list[Row]], advance: Advance) -> Measured:
    """Measure the cells that are not cached, each stored as soon as it is finished.

    A cell that raises is recorded and the others go on; KeyboardInterrupt stops the run.

    Raises:
        MemoryShortage: a cell needs more memory than is available; raised before anything is measured.
        StorageFull: a finished cell cannot be stored; the cells before it are.
    """
    pending = [cell for cell in plan.cells if cell not in cached]
    _check_memory(plan, pending)
    measured = Measured(dict(cached))
    try:
        for cell in pending:
            advance(cell, *_measure_cell(plan, cell, measured))
    except KeyboardInterrupt:
        log.warning("interrupted; %d of %d cells are finished", len(measured.rows), len(plan.cells))
        measured.interrupted = True
    measured.rows = {cell: measured.rows[cell] for cell in plan.cells if cell in measured.rows}
    return measured


def _measure_cell(plan: Plan[C], cell: Cell, measured: Measured) -> tuple[str, bool]:
    """Measure one cell into ``measured``; what became of it, in words, and whether that is trouble."""
    start = time.perf_counter()
    try:
        rows = normalise(cell, plan.analysis.measure(cell, plan.config))
    except Exception as error:
        log.exception("cell %s failed", cell)
        reason = f"{type(error).__name__}: {error}"
        measured.failures.append(Failure(cell, reason))
        measured.shortage = measured.shortage or _shortage(plan, cell, error)
        return f"failed: {reason}", True
    plan.cache.store(cell, rows)
    measured.rows[cell] = rows
    took = duration(time.perf_counter() - start)
    log.info("cell %s: %d observations in %s", cell, len(rows), took)
    table = tabulate({cell: rows})
    nonfinite = [locate(row) for row in records(table[faults(table)])]
    for where in nonfinite:
        log.warning("non-finite value: %s", where)
    return (f"{took}, non-finite: {nonfinite[0]}", True) if nonfinite else (took, False)


def _check_memory(plan: Plan[C], pending: Sequence[Cell]) -> None:
    available = available_memory(plan.config.device)
    _, needed, cell = plan.estimate(pending)
    if available is not None and needed > available:
        raise MemoryShortage(f"cell {cell}", f"about {size(needed)}", available, plan.analysis.memory_option)


def _shortage(plan: Plan[C], cell: Cell, error: Exception) -> StudyError | None:
    """The error as a shortage of memory or data, if it is one; torch's CPU allocator raises RuntimeError."""
    if isinstance(error, MemoryShortage | DataUnavailable):
        return error
    if not isinstance(error, MemoryError | torch.OutOfMemoryError) and "DefaultCPUAllocator" not in str(error):
        return None
    _, estimated, _ = plan.estimate([cell])
    needed = f"more than the {size(estimated)} that were estimated ({str(error) or type(error).__name__})"
    return MemoryShortage(f"cell {cell}", needed, available_memory(plan.config.device), plan.analysis.memory_option)
