"""Cells measured by anything with ``submit``: what is lost on the way is measured again, what comes back is stored here."""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import re
import time
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from typing import Any

from curvlab.study.cells import Cell
from curvlab.study.chunks import Chunking, cores
from curvlab.study.executors.interface import Executor, Future, Lost
from curvlab.study.executors.parcel import Delivery, Parcel, measured
from curvlab.study.faults import UsageError
from curvlab.study.task import Attempt, Task

log = logging.getLogger(__name__)

TRIES = 3
"""How often a cell is tried whose jobs are lost, and no other cell can be to blame."""
PAUSES = (0.01, 0.5)
"""Seconds between two looks at what is finished: at first, and where nothing happens at most."""


class Submitted:
    """An executor as the machines of a run.

    Args:
        name: By which the user asked for it.
        executor: It.
        make: Makes another, if it breaks; None if it is the user's own, which is left open.
    """

    here = False

    def __init__(self, name: str, executor: Executor, make: Callable[[], Executor] | None = None) -> None:
        self.name, self.executor, self.make = name, executor, make
        self.chunking: Chunking = getattr(executor, "chunking", Chunking())
        self.starting: float = getattr(executor, "starting", 3.0)
        self._scattered: tuple[Parcel | None, Any] = (None, None)

    def capacity(self, device: str) -> int:  # noqa: ARG002  # the executor knows its machines
        """What the executor says, or else one a core of this machine."""
        return max(1, int(getattr(self.executor, "capacity", None) or cores()))

    def named(self, workers: int) -> str:
        """So many jobs."""
        return f"{workers} {'job' if workers == 1 else 'jobs'} at a time, by --executor {self.name}"

    def outcomes(self, task: Task[Any], costs: Mapping[Cell, float], workers: int) -> Iterator[Attempt]:
        """Measure cells by so many jobs at a time, and store here what was stored elsewhere.

        Raises:
            UsageError: the executor takes no jobs, or its machines lack a module.
            StorageFull: a finished cell, or the sign of the run, cannot be stored.
        """
        chunks = self.chunking.chunks(costs, workers)
        with contextlib.closing(self._attempts(task, chunks, workers)) as attempts:
            for attempt in attempts:
                if attempt.rows is not None and task.cache.load(attempt.cell, of_this_run=True) is None:
                    task.cache.store(attempt.cell, attempt.rows)
                yield attempt

    def close(self) -> None:
        """End the executor, unless it is the user's own."""
        if self.make is None:
            return
        close = getattr(self.executor, "close", None) or getattr(self.executor, "shutdown", None)
        if close is not None:
            close()

    def _attempts(self, task: Task[Any], chunks: Sequence[list[Cell]], workers: int) -> Generator[Attempt]:
        strangers = multiprocessing.active_children()
        parcel = Parcel.of(task, shared=getattr(self.executor, "shares_files", False))
        jobs = _Jobs(task, deque(chunks))
        with parcel.signed():
            try:
                pause = PAUSES[0]
                while True:
                    free = len(chunks) if getattr(self.executor, "queues", False) else workers - len(jobs.running)
                    if ready := jobs.ready(free):
                        jobs.running |= dict(zip(self._submit(parcel, ready, workers), ready, strict=True))
                    if not jobs.running:
                        return
                    finished = [future for future in jobs.running if future.done()]
                    for future in finished:
                        yield from jobs.settle(future)
                    pause = PAUSES[0] if finished else min(2 * pause, PAUSES[1])
                    time.sleep(0 if finished else pause)
            except BaseException:
                if self.make is None or not hasattr(self.executor, "close"):
                    for future in jobs.running:
                        future.cancel()
                if self.make is not None:
                    for process in multiprocessing.active_children():
                        if process not in strangers:
                            process.kill()
                self.close()
                raise

    def _submit(self, parcel: Parcel, chunks: Sequence[list[Cell]], workers: int) -> list[Future]:
        """Hand chunks to the executor, or to another one if it is broken."""
        try:
            return self._handed(parcel, chunks, workers)
        except Exception as error:
            if self.make is None:
                raise self._refusal(error) from error
            log.warning("--executor %s is broken (%s) and started again", self.name, error)
            self.close()
        try:
            self.executor, self._scattered = self.make(), (None, None)
            return self._handed(parcel, chunks, workers)
        except Exception as error:
            raise self._refusal(error) from error

    def _handed(self, parcel: Parcel, chunks: Sequence[list[Cell]], workers: int) -> list[Future]:
        if self._scattered[0] is not parcel:
            self._scattered = parcel, getattr(self.executor, "scatter", lambda value: value)(parcel)
        sent = self._scattered[1]
        if together := getattr(self.executor, "submit_all", None):
            return list(together(measured, sent, chunks, workers))
        return [self.executor.submit(measured, sent, chunk) for chunk in chunks]

    def _refusal(self, error: Exception) -> UsageError:
        return UsageError(f"--executor {self.name} takes no jobs: {type(error).__name__}: {error}")


class _Jobs:
    """The cells that wait, those that are measured, and what becomes of those whose job is lost."""

    def __init__(self, task: Task[Any], waiting: deque[list[Cell]]) -> None:
        self.task, self.waiting = task, waiting
        self.running: dict[Future, list[Cell]] = {}
        self.suspects: deque[Cell] = deque()
        self.alone: set[Cell] = set()
        self.tries: Counter[Cell] = Counter()
        self.written: dict[Cell, int] = {}

    def ready(self, free: int) -> list[list[Cell]]:
        """What can be handed out where so many workers are free; a suspect only if nothing else is going on."""
        if self.waiting:
            return [self.waiting.popleft() for _ in range(min(free, len(self.waiting)))]
        if self.suspects and not self.running:
            cell = self.suspects.popleft()
            self.alone.add(cell)
            return [[cell]]
        return []

    def settle(self, future: Future) -> Iterator[Attempt]:
        """What a job that has ended brings; the cells that it leaves wait again."""
        cells = self.running.pop(future)
        try:
            delivery: Delivery = future.result()
        except Lost as lost:
            yield from self._lost(cells, lost)
        except Exception as error:
            yield from self._broken(cells, error)
        else:
            yield from delivery.attempts
            if delivery.error is not None:
                raise delivery.error
            yield from self._ended_early(cells[len(delivery.attempts) :], progress=bool(delivery.attempts))

    def _lost(self, cells: Sequence[Cell], lost: Lost) -> Iterator[Attempt]:
        """Cells whose job came to nothing for a reason of its own: again, one by one, so that only the one to blame can fail."""
        divided = len(cells) > 1 and (lost.again or lost.out_of_memory)
        for cell in cells:
            if self._tried(cell) < TRIES and (divided or lost.again):
                self.waiting.append([cell])
                log.warning("cell %s: its job was lost (%s); it is measured again", cell, lost.reason)
            else:
                yield _failed(cell, f"its job was lost ({lost.reason})", out_of_memory=lost.out_of_memory)

    def _broken(self, cells: Sequence[Cell], error: Exception) -> Iterator[Attempt]:
        """Cells whose job was lost with others' or for an unknown reason: again, with nothing beside them."""
        if missing := re.search(r"No module named '[^']+'", str(error)):
            raise UsageError(
                f"a machine that is to measure lacks a module ({missing[0]}): curvlab and the analysis have to be installed "
                "on every machine, or lie in a folder that all of them see"
            ) from error
        reason = _summary(error)
        for cell in cells:
            if cell in self.alone:
                yield _failed(cell, f"its job was lost ({reason})")
            else:
                self.suspects.append(cell)
                log.warning("cell %s: its job was lost (%s); it is measured again, alone", cell, reason)

    def _ended_early(self, left: Sequence[Cell], *, progress: bool) -> Iterator[Attempt]:
        """Cells that a job did not come to: again; the first counts as tried if it was all that the job was on."""
        if not left:
            return
        first, *others = left
        if progress or self._tried(first) < TRIES:
            self.waiting.append([first, *others])
            return
        yield _failed(first, f"{TRIES} jobs ran out of time in it, and its checkpoint, if it has one, did not move on")
        if others:
            self.waiting.append(others)

    def _tried(self, cell: Cell) -> int:
        """How often a cell has been tried in vain, this time included; going on from its checkpoint is not in vain."""
        path = self.task.cache.checkpoint(cell)
        written = path.stat().st_mtime_ns if path.exists() else 0
        if written == self.written.get(cell, 0):
            self.tries[cell] += 1
        self.written[cell] = written
        return self.tries[cell]


def _summary(error: Exception) -> str:
    """What an error says in one line: the last that names an error, as the last of a traceback does, or else the first."""
    lines = str(error).splitlines() or [""]
    named = [line for line in lines if re.match(r"[\w.]*(Error|Exception)\b", line)]
    return named[-1] if named else f"{type(error).__name__}: {lines[0]}"


def _failed(cell: Cell, reason: str, *, out_of_memory: bool = False) -> Attempt:
    log.error("cell %s failed: %s", cell, reason)
    return Attempt.failed(cell, reason, out_of_memory=out_of_memory)
