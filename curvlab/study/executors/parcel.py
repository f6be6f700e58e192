"""What another process or machine is sent in order to measure cells, and what it does with that."""

from __future__ import annotations

import functools
import logging
import os
import pickle
import socket
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from multiprocessing import spawn
from pathlib import Path
from typing import Any

import torch

from curvlab.study.cells import Cell
from curvlab.study.faults import UsageError
from curvlab.study.logbook import forward, forwarded
from curvlab.study.measurements import Row
from curvlab.study.task import Attempt, Task
from curvlab.tools.errors import CommandError
from curvlab.tools.storage import writing

log = logging.getLogger(__name__)

PASSED_ON = ("CURVLAB_DATA",)
"""Variables that name folders, which other machines are told."""
MAIN = ("init_main_from_name", "init_main_from_path")
"""What `multiprocessing` says about the script that was started, so that what it defines is found elsewhere."""

_UNPACKING = threading.Lock()


class Stopped(BaseException):
    """The job has to end now, because its time is up or its machine is wanted for something else."""


@dataclass(frozen=True)
class Delivery:
    """What became of the cells of a job.

    Attributes:
        attempts: One a cell, in order; fewer than cells if the job had to end before.
        error: What stops the whole run, if something does.
    """

    attempts: tuple[Attempt, ...]
    error: CommandError | None = None


@dataclass(frozen=True)
class Parcel:
    """A task with everything that it needs elsewhere.

    Attributes:
        task: It, pickled by itself: it can be loaded only once folders and script are known, and where its modules are missing
            the job says so, instead of the executor failing as it takes up the parcel.
        sender: Machine and process that sent it.
        sign: A file that is there as long as the run goes on, beside its cache: a machine that sees it shares the cache.
        before: Cells that were measured already and may be read, for machines that do not share the cache.
        folders: The folders from which the sender imports.
        script: How the script is found that was started, if it was one.
        variables: Variables of the environment that name folders.
    """

    task: bytes
    sender: tuple[str, int]
    sign: Path
    before: Mapping[Cell, list[Row]]
    folders: tuple[str, ...]
    script: Mapping[str, Any]
    variables: Mapping[str, str]

    @classmethod
    def of(cls, task: Task[Any], *, shared: bool) -> Parcel:
        """The parcel of a task; machines that ``shared`` files are known to be seen by need less in it."""
        folder = task.cache.folder.absolute()
        cells = (
            {} if shared else {cell: None for cells in task.before.values() for one in cells.values() for cell in one}
        )
        stored = ((cell, task.cache.load(cell, of_this_run=task.config.fresh)) for cell in cells)
        script = spawn.get_preparation_data(__name__)
        return cls(
            task=pickle.dumps(replace(task, cache=replace(task.cache, folder=folder))),
            sender=_here(),
            sign=folder / f"{task.cache.run}.running",
            before={cell: rows for cell, rows in stored if rows is not None},
            folders=tuple(str(Path(entry).absolute()) for entry in sys.path if entry),
            script={name: script[name] for name in MAIN if name in script},
            variables={name: str(Path(os.environ[name]).absolute()) for name in PASSED_ON if os.environ.get(name)},
        )

    @contextmanager
    def signed(self) -> Iterator[None]:
        """The run goes on in here; `writing` lists the errors."""
        with writing(self.sign):
            self.sign.touch()
        try:
            yield
        finally:
            self.sign.unlink(missing_ok=True)

    @property
    def is_here(self) -> bool:
        """Whether this is the process that sent it."""
        return self.sender == _here()

    def unpacked(self) -> Task[Any]:
        """The task, with a cache that lies on this machine; threads unpack one after the other.

        Raises:
            UsageError: what it consists of cannot be imported here.
        """
        with _UNPACKING:
            return self._unpacked()

    def _unpacked(self) -> Task[Any]:
        if not self.is_here:
            _settle()
            for name, folder in self.variables.items():
                if Path(folder).is_dir() or name not in os.environ:
                    os.environ[name] = folder
            sys.path.extend(entry for entry in self.folders if entry not in sys.path and Path(entry).exists())
        try:
            if not self.is_here:
                spawn.prepare(dict(self.script))
            task: Task[Any] = pickle.loads(self.task)
        except Exception as error:
            raise UsageError(
                f"what is to be measured cannot be loaded on {socket.gethostname()} ({type(error).__name__}: {error}). Its "
                "modules have to be installed on every machine, or lie in a folder that all of them see"
            ) from error
        return task if self.sign.exists() else replace(task, cache=replace(task.cache, folder=self._own_folder(task)))

    def _own_folder(self, task: Task[Any]) -> Path:
        """A cache of this process, on a machine that does not see the run's."""
        folder = Path(_temporary(task.cache.run).name)
        cache = replace(task.cache, folder=folder)
        for cell, rows in self.before.items():
            if not cache.path(cell).exists():
                cache.store(cell, rows)
        return folder


def measured(parcel: Parcel, cells: Sequence[Cell]) -> Delivery:
    """Measure cells, one after the other, wherever this is called; it ends early where it is `Stopped`, or the run is over.

    A cell that a job before it has finished already is not measured again.
    """
    attempts: list[Attempt] = []
    try:
        task = parcel.unpacked()
        shares = task.cache.folder == parcel.sign.parent
        if not parcel.is_here:
            log.info("%d cells on %s, in process %d", len(cells), *_here())
        for cell in cells:
            if shares and not parcel.sign.exists():
                break
            rows = task.cache.load(cell, of_this_run=task.config.fresh)
            attempt = task(cell) if rows is None else Attempt(cell, "by a job before", False, rows)
            attempts.append(replace(attempt, logged=forwarded()))
    except Stopped:
        log.warning("the job has to end after %d of its %d cells", len(attempts), len(cells))
    except CommandError as error:
        return Delivery(tuple(attempts), error)
    return Delivery(tuple(attempts))


def _here() -> tuple[str, int]:
    return socket.gethostname(), os.getpid()


@functools.cache
def _settle() -> None:
    """Set up a process of another's, once: as many threads as it was started for, and a log that goes to the run's."""
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS") or 1))
    forward()


@functools.cache
def _temporary(run: str) -> tempfile.TemporaryDirectory[str]:
    """A folder of this process for one run, which goes with it."""
    return tempfile.TemporaryDirectory(prefix=f"curvlab-{run}-")
