"""Processes that measure cells side by side: none outlives the run, and one that dies takes only its cell along."""

import contextlib
import logging
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace

import torch

from curvlab.study.cells import Cell
from curvlab.study.logbook import forward, forwarded
from curvlab.study.task import Attempt

log = logging.getLogger(__name__)

START = "spawn"
"""How processes are started: torch and its threads do not survive a fork."""

THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
"""Variables that say how many threads the numerical libraries use."""
KEPT = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(16 << 30)}
"""Variables that let the C library (glibc) keep freed memory.

Tensors of the size of the parameters are otherwise returned to the system after every operation and zeroed again for the
next, which takes two fifths of the time of cells with four million parameters."""

Job = Callable[[Cell], Attempt]


def in_processes(job: Job, chunks: Sequence[Sequence[Cell]], workers: int) -> Iterator[Attempt]:
    """Do ``job`` on every cell in ``workers`` processes; the outcomes, as they come.

    Closing the iterator stops the processes at once. If they cannot be started, the cells are done in this one.

    Raises:
        Exception: what ``job`` raised.
    """
    left = dict.fromkeys(cell for chunk in chunks for cell in chunk)
    try:
        with contextlib.closing(_staffed(job, deque(chunks), workers)) as outcomes:
            for outcome in outcomes:
                del left[outcome.cell]
                yield outcome
    except _CannotStart:
        log.warning("worker processes cannot be started; the remaining cells are measured one after the other")
        yield from map(job, left)


def _staffed(job: Job, waiting: deque[Sequence[Cell]], workers: int) -> Generator[Attempt]:
    """`in_processes`; a worker that dies is replaced only if it was the last, as most often memory ran out."""
    strangers = multiprocessing.active_children()
    staff: list[_Worker] = []
    try:
        for _ in range(workers):
            staff.append(_Worker(job))  # noqa: PERF401  # the first are to be stopped if a later one cannot be started
        while waiting or any(worker.assigned for worker in staff):
            for worker in staff:
                if waiting and not worker.assigned:
                    worker.assign(waiting.popleft())
            wait([worker.assigned[0][1] for worker in staff if worker.assigned], return_when=FIRST_COMPLETED)
            for worker in tuple(staff):
                yield from worker.outcomes()
                if worker.died:
                    yield worker.epitaph()
                    if unfinished := [cell for cell, _ in worker.assigned]:
                        waiting.appendleft(unfinished)
                    staff.remove(worker)
            if not staff:
                staff.append(_Worker(job))
    except BaseException:
        for process in multiprocessing.active_children():
            if process not in strangers:
                process.terminate()
        raise
    finally:
        for worker in staff:
            worker.executor.shutdown(cancel_futures=True)


class _CannotStart(Exception):
    """A worker process died before it had begun."""


class _Worker:
    """One process with the cells that are assigned to it, in order: it is on the first.

    Each is an executor of its own, so that the death of one does not touch the others.
    """

    def __init__(self, job: Job) -> None:
        self.job = job
        self.assigned: deque[tuple[Cell, Future[Attempt]]] = deque()
        self.died = False
        self.executor = ProcessPoolExecutor(1, multiprocessing.get_context(START), _prepare)
        others = multiprocessing.active_children()
        with _starting():
            self.ready = self.executor.submit(_begin, job)
        self.processes = [process for process in multiprocessing.active_children() if process not in others]

    def assign(self, chunk: Sequence[Cell]) -> None:
        for cell in chunk:
            try:
                future = self.executor.submit(_measure, self.job, cell)
            except BrokenProcessPool as error:
                future = Future()
                future.set_exception(error)
            self.assigned.append((cell, future))

    def outcomes(self) -> Iterator[Attempt]:
        """What is finished, until the worker is found dead."""
        while self.assigned and self.assigned[0][1].done():
            try:
                outcome = self.assigned[0][1].result()
            except BrokenProcessPool:
                self.died = True
                return
            self.assigned.popleft()
            yield outcome

    def epitaph(self) -> Attempt:
        """The failure of the cell that the dead worker was on.

        Raises:
            _CannotStart: it was on none.
        """
        self.executor.shutdown()
        if self.ready.exception():
            raise _CannotStart
        cell, _ = self.assigned.popleft()
        [code] = [process.exitcode for process in self.processes]
        killed = code == -signal.SIGKILL
        how = "killed, most likely because memory ran out; fewer --workers need less" if killed else f"exit code {code}"
        reason = f"its process died ({how})"
        log.error("cell %s failed: %s", cell, reason)
        return Attempt.failed(cell, reason, out_of_memory=killed)


@contextlib.contextmanager
def variables(threads: int = 1) -> Iterator[None]:
    """What is started in here computes on so many threads, and keeps memory that it has freed."""
    settings = KEPT | dict.fromkeys(THREADS, str(threads))
    before = {name: os.environ.get(name) for name in settings}
    os.environ.update(settings)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@contextlib.contextmanager
def _starting() -> Iterator[None]:
    """A process that is started in here computes on one thread and leaves Ctrl-C to this one."""
    masks = hasattr(signal, "pthread_sigmask")  # not on Windows
    before_masked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT}) if masks else set()
    try:
        with variables():
            yield
    finally:
        if masks:
            signal.pthread_sigmask(signal.SIG_SETMASK, before_masked)


def _prepare() -> None:
    """Set up a worker process."""
    torch.set_num_threads(1)
    forward()
    threading.Thread(target=_follow, daemon=True).start()


def _follow() -> None:
    """End with the run, however that ends."""
    run = multiprocessing.parent_process()
    if run is not None:
        run.join()
        os._exit(1)


def _begin(job: Job) -> None:
    """Show that the job arrives in a worker."""


def _measure(job: Job, cell: Cell) -> Attempt:
    outcome = job(cell)
    return replace(outcome, logged=forwarded())
