"""Which cells a run has to measure, and measuring them so that nothing finished is ever lost."""

import contextlib
import itertools
import logging
import pickle
import sys
from collections import Counter
from collections.abc import Collection, Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Generic
from uuid import uuid4

from curvlab.study.analysis import Analysis
from curvlab.study.cache import CellCache
from curvlab.study.cells import Cell
from curvlab.study.claims import Claim, Failure
from curvlab.study.environment import check_device
from curvlab.study.executors import Machines, machines
from curvlab.study.faults import MemoryShortage, UsageError
from curvlab.study.logbook import replay
from curvlab.study.measurements import Row
from curvlab.study.options import SEEDS, SHOWN, C, names_script, recorded, repeats, settings, share
from curvlab.study.statistics.multiplicity import LOOKS, Looks
from curvlab.study.statistics.rules import Observed, Tested
from curvlab.study.task import Attempt, Task
from curvlab.tools.errors import CommandError
from curvlab.tools.memory import available_memory
from curvlab.tools.progress import Advance
from curvlab.tools.text import duration, size, unknown

log = logging.getLogger(__name__)

WORTH_WORKERS = 10.0
"""Seconds of work from which starting processes pays."""


@dataclass(frozen=True)
class Plan(Generic[C]):
    """What one run does.

    Attributes:
        analysis: The analysis.
        config: The configuration.
        claims: The claims that are judged together, those among them that no cell serves.
        shown: The ids of those that were asked for.
        planned: All cells that they need, in order, and those of the experiments that come before.
        left_out: Cells that they need, of experiments that were not asked for.
        cells: The cells that this run measures: its share of them under ``--shard``.
        data: Digest of the data.
        cache: Where finished cells are kept.
        machines: Where cells are measured; whoever makes a plan closes them.
    """

    analysis: Analysis[C]
    config: C
    claims: tuple[Claim, ...]
    shown: frozenset[str]
    planned: tuple[Cell, ...]
    left_out: tuple[Cell, ...]
    cells: tuple[Cell, ...]
    data: str
    cache: CellCache
    machines: Machines

    @classmethod
    def of(cls, analysis: Analysis[C], config: C) -> "Plan[C]":
        """The plan of a configuration.

        Raises:
            UsageError: an unknown claim, an option that names a value twice, a device that cannot be used, or an executor
                that cannot.
            UnknownName: an unknown executor.
            DataUnavailable: from the analysis.
            ValueError: the analysis has two claims of the same name, or one that is given a claim which there is not.
        """
        if repeated_values := repeats(config):
            raise UsageError(f"{repeated_values}; name each once")
        where = machines(config.executor, settings(config))
        if where.here:
            check_device(config.device)
        claims = tuple(analysis.claims(config))
        if repeated := sorted(name for name, count in Counter(claim.id for claim in claims).items() if count > 1):
            raise ValueError(f"{analysis.name} has claims that are called the same: {', '.join(repeated)}")
        known = {claim.id: claim for claim in claims}
        _check_given(known)
        _check_known("--claims", "claim", config.claims, known)
        _check_known("--experiments", "experiment", config.experiments, [e.name for e in analysis.experiments])
        shown = frozenset(config.claims or known)
        all_cells = analysis.cells(config)
        if config.claims:
            claims = _deciding(shown, claims, all_cells if config.seeds == "auto" else ())
        wanted = _serving(analysis, all_cells, claims if config.claims else None)
        named = config.experiments or tuple(e.name for e in analysis.experiments)
        asked = {*named, *(before for name in named for before in analysis.ancestors(name))}
        cells = tuple(cell for cell in wanted if cell["experiment"] in asked)
        left_out = tuple(cell for cell in wanted if cell["experiment"] not in asked)
        planned = cells
        if config.shard:
            index, total = share(config.shard)
            cells = cells[index - 1 :: total]
        data = analysis.data_hash(config)
        choosing = SHOWN | SEEDS | {*analysis.axes}
        context = {
            "analysis": analysis.name,
            "version": analysis.version,
            "config": {name: value for name, value in recorded(config).items() if name not in choosing},
            "data": data,
        }
        cache = CellCache(config.results / ".cache" / analysis.name, context, uuid4().hex)
        return cls(analysis, config, claims, shown, planned, left_out, cells, data, cache, where)

    @property
    def looks(self) -> Looks | None:
        """When the run looks; None if it looks once, at all of its seeds."""
        return Looks(LOOKS, self.config.first_seed) if self.config.seeds == "auto" else None

    def until(self, later: range, claims: Sequence[Claim], planned: Sequence[Cell]) -> "Plan[C]":
        """The part of a sequential run that comes before later seeds: the cells that some claims need, and aren't planned yet."""
        cells = _serving(self.analysis, [cell for cell in self.planned if cell["seed"] not in later], claims)
        known, new = {*planned}, {*cells}.difference(planned)
        return replace(
            self,
            planned=tuple(cell for cell in self.planned if cell in known | new),
            cells=tuple(cell for cell in cells if cell in new),
        )

    def cached(self) -> dict[Cell, list[Row]]:
        """The cells that need no work, with their observations; under ``--fresh`` those that this run has measured."""
        loaded = ((cell, self.cache.load(cell, of_this_run=self.config.fresh)) for cell in self.cells)
        return {cell: rows for cell, rows in loaded if rows is not None}

    def task(self) -> Task[C]:
        """What measures one of its cells."""
        experiments = self.analysis.experiments
        cells = {e.name: tuple(cell for cell in self.planned if cell["experiment"] == e.name) for e in experiments}
        before = {e.name: {name: cells[name] for name in self.analysis.ancestors(e.name)} for e in experiments}
        return Task({e.name: e.measure for e in experiments}, before, self.config, self.cache)

    def stages(self, costs: Mapping[Cell, float]) -> list[dict[Cell, float]]:
        """Cells and their seconds, in groups of which each waits for those before it."""
        return [dict(group) for _, group in itertools.groupby(costs.items(), lambda item: self.analysis.stage(item[0]))]

    def estimate(self, cells: Sequence[Cell]) -> "Workload":
        """What it takes to measure ``cells``."""
        needs = {cell: self.analysis.resources(cell, self.config) for cell in cells}
        costs = {cell: seconds for cell, (seconds, _) in needs.items()}
        largest = sorted(needs, key=lambda cell: needs[cell][1], reverse=True)
        totals = list(itertools.accumulate(needs[cell][1] for cell in largest))
        available = available_memory(self.config.device) if self.machines.here else None
        workers = self._workers(costs)
        if available is not None and totals:
            fitting = sum(total <= available for total in totals[:workers])
            if 0 < fitting < workers:
                log.info("%d workers instead of %d, for %s of memory", fitting, workers, size(available))
            workers = max(1, fitting)
        return Workload(
            costs=costs,
            workers=workers,
            memory=totals[workers - 1] if totals else 0.0,
            largest=largest[0] if largest else None,
            available=available,
            starting=self.machines.starting,
            where=self.machines.named(workers) if costs else "",
        )

    def _workers(self, costs: Mapping[Cell, float]) -> int:
        """How many processes or jobs are worth their start and can be given work, whatever their memory.

        Raises:
            UsageError: the analysis cannot be sent to another machine.
        """
        here = self.machines.here
        if not costs or (here and sum(costs.values()) < WORTH_WORKERS):
            return 1
        wanted = self.config.workers or self.machines.capacity(self.config.device)
        if here and wanted == 1:
            return 1
        if reason := self._stays():
            if not here:
                raise UsageError(f"--executor {self.config.executor}: {reason}; --executor local measures here")
            log.info("one worker instead of %d, because %s", wanted, reason)
            return 1
        return min(wanted, len(self.machines.chunking.chunks(costs, wanted)))

    def _stays(self) -> str:
        """Why its cells cannot be sent to other processes; empty if they can."""
        if names_script(self.config) and not hasattr(sys.modules["__main__"], "__file__"):
            return "what is defined in no file cannot be sent to others"
        try:
            pickle.dumps(self.task())
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            return f"{self.analysis.name} cannot be sent to others: {error}"
        return ""


def _check_known(option: str, what: str, names: Sequence[str], known: Iterable[str]) -> None:
    for name in names:
        if name not in (names_known := tuple(known)):
            raise UsageError(f"{option}: {unknown(what, name, names_known)}")


def _check_given(known: Mapping[str, Claim]) -> None:
    """Make sure that claims are given claims that there are, and not each other."""
    for claim in known.values():
        chain = [claim.id]
        while given := known[chain[-1]].given:
            if given not in known:
                raise ValueError(f"claim {chain[-1]} is given {given!r}, which is no claim")
            if given in chain:
                raise ValueError(f"claims are given each other: {', '.join(chain)}")
            chain.append(given)


def _deciding(shown: Collection[str], claims: Sequence[Claim], shared: Sequence[Cell]) -> tuple[Claim, ...]:
    """The claims on which the verdicts that are asked for depend.

    These are the claims themselves, those that give them their meaning, and all that are tested with one of them. In a
    sequential run a claim about every observation also sees what others measure in cells that it shares with them.

    Args:
        shown: The ids of the claims that are asked for.
        claims: All claims.
        shared: The cells of a sequential run.
    """
    found: set[str] = set()
    more = {*shown}
    while more != found:
        found = more
        inside = [claim for claim in claims if claim.id in found]
        groups = {claim.group for claim in inside if isinstance(claim.rule, Tested)}
        observed = [claim for claim in inside if isinstance(claim.rule, Observed)]
        cells = [cell for cell in shared if any(claim.needs(cell) for claim in observed)]
        beside = [c for c in claims if isinstance(c.rule, Tested) and (c.group in groups or any(map(c.needs, cells)))]
        more = found | {claim.given for claim in inside if claim.given} | {claim.id for claim in beside}
    return tuple(claim for claim in claims if claim.id in found)


def _serving(analysis: Analysis[C], cells: Sequence[Cell], claims: Sequence[Claim] | None) -> tuple[Cell, ...]:
    """The cells that some claims need, and those of the experiments that come before these; all if None."""
    needed = {cell for cell in cells if claims is None or any(claim.needs(cell) for claim in claims)}
    before = {name for cell in needed for name in analysis.ancestors(str(cell["experiment"]))}
    return tuple(cell for cell in cells if cell in needed or cell["experiment"] in before)


@dataclass(frozen=True)
class Workload:
    """What it takes to measure some cells.

    Attributes:
        costs: Seconds of each cell.
        workers: Processes or jobs that measure side by side.
        memory: Bytes that they need together at worst.
        largest: The cell that needs most of it; None if there are no cells.
        available: Bytes that can be had; None where the system does not tell, or another one measures.
        starting: Seconds until others have begun.
        where: The workers in words; empty if this process measures.
    """

    costs: Mapping[Cell, float]
    workers: int
    memory: float
    largest: Cell | None
    available: float | None
    starting: float
    where: str

    @property
    def time(self) -> str:
        """How long that takes a command that has started, in words; the start of others is part of it."""
        seconds = sum(self.costs.values())
        if not self.where:
            return f"about {duration(seconds)}"
        return f"about {duration(self.starting + seconds / self.workers)} in {self.where}"


@dataclass
class Measured:
    """What became of the cells of a plan.

    Attributes:
        rows: Observations of the cells that have them.
        failures: The cells that were tried in vain.
        shortage: The first failure that more memory or more data would cure.
        interrupted: Whether the run was stopped before every cell had been tried.
        work: How many cells this run measured, instead of taking them from the cache.
    """

    rows: dict[Cell, list[Row]]
    failures: list[Failure] = field(default_factory=list)
    shortage: CommandError | None = None
    interrupted: bool = False
    work: int = 0

    def extended(self, more: "Measured", cells: Sequence[Cell]) -> "Measured":
        """What became of these cells in two parts of a run, in their order."""
        rows = self.rows | more.rows
        failures = {failure.cell: failure for failure in [*self.failures, *more.failures]}
        return Measured(
            {cell: rows[cell] for cell in cells if cell in rows},
            [failures[cell] for cell in cells if cell in failures],
            more.shortage,
            more.interrupted,
            self.work + more.work,
        )


def measure(plan: Plan[C], cached: dict[Cell, list[Row]], estimate: Workload, advance: Advance) -> Measured:
    """Measure the cells of ``estimate``, which are those not cached, each stored as soon as it is finished.

    A cell that raises is recorded and the others go on; KeyboardInterrupt stops the run.

    Raises:
        MemoryShortage: a cell needs more memory than is available; raised before anything is measured.
        StorageFull: a finished cell cannot be stored; the cells before it are.
    """
    if estimate.available is not None and estimate.memory > estimate.available:
        where, needed = f"cell {estimate.largest}", f"about {size(estimate.memory)}"
        raise MemoryShortage(where, needed, estimate.available, plan.analysis.memory_option)
    measured = Measured(dict(cached))
    try:
        with contextlib.closing(_outcomes(plan, estimate)) as outcomes:
            for outcome in outcomes:
                replay(outcome.logged)
                if outcome.rows is not None:
                    measured.work += 1
                    measured.rows[outcome.cell] = outcome.rows
                else:
                    measured.failures.append(Failure(outcome.cell, outcome.reason))
                    measured.shortage = measured.shortage or _shortage(plan, outcome)
                advance(outcome.cell, outcome.note, outcome.trouble)
    except KeyboardInterrupt:
        measured.rows |= plan.cached()
        log.warning("interrupted; %d of %d cells are finished", len(measured.rows), len(plan.cells))
        measured.interrupted = True
    return Measured({}).extended(measured, plan.cells)


def _outcomes(plan: Plan[C], estimate: Workload) -> Generator[Attempt]:
    task = plan.task()
    if estimate.where:
        log.info("measuring in %s", estimate.where)
    for costs in plan.stages(estimate.costs):
        yield from plan.machines.outcomes(task, costs, estimate.workers)


def _shortage(plan: Plan[C], outcome: Attempt) -> CommandError | None:
    """The failure as a shortage of memory or data, if it is one."""
    if not outcome.out_of_memory:
        return outcome.shortage
    _, estimated = plan.analysis.resources(outcome.cell, plan.config)
    where, needed = f"cell {outcome.cell}", f"more than the {size(estimated)} that were estimated ({outcome.reason})"
    return MemoryShortage(where, needed, available_memory(plan.config.device), plan.analysis.memory_option)
