"""What an executor is, and what a run asks of the machines that measure its cells."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping
from types import ModuleType
from typing import Any, Protocol, runtime_checkable

from curvlab.study.cells import Cell
from curvlab.study.chunks import Chunking
from curvlab.study.faults import UsageError
from curvlab.study.task import Attempt, Task


@runtime_checkable
class Future(Protocol):
    """What becomes of a call."""

    def done(self) -> bool:
        """Whether it has ended, in whatever way."""

    def result(self) -> Any:
        """What the call returned.

        Raises:
            Lost: the call has come to nothing, and the executor knows why; it goes on with other calls.
            Exception: it has come to nothing for another reason.
        """

    def cancel(self) -> object:
        """Stop it, or keep it from starting, as far as that can be done."""


@runtime_checkable
class Executor(Protocol):
    """Anything with ``submit``, such as those of `concurrent.futures`, loky and dask.

    It may have more. `Ray` and `Slurm` do, and others are treated alike:

    - ``capacity``: how many calls it does at a time;
    - ``chunking``: how long they should take, a `Chunking`;
    - ``starting``: seconds until the first has begun;
    - ``queues``: True if it is given all calls at once, because it has a queue of its own;
    - ``shares_files``: True if all its machines see the folder of the results;
    - ``scatter(value)``: make a value of many calls known to all machines; what it returns is passed on in its place;
    - ``submit_all(function, parcel, chunks, workers)``: `submit` for many at once;
    - ``close()``, or else ``shutdown()``.
    """

    def submit(self, function: Callable[..., Any], /, *arguments: Any) -> Future:
        """Call a function of a module elsewhere."""


class Lost(Exception):
    """A job that has come to nothing, as its machine or its process did; no fault of any other job.

    Attributes:
        reason: Why, in words.
        out_of_memory: Whether memory ran out.
        again: Whether it is worth another try.
    """

    def __init__(self, reason: str, *, out_of_memory: bool = False, again: bool = True) -> None:
        super().__init__(reason)
        self.reason, self.out_of_memory, self.again = reason, out_of_memory, again


@runtime_checkable
class Machines(Protocol):
    """Where the cells of a run are measured.

    Attributes:
        here: Whether that is on this machine, whose cores, memory and device then count.
        chunking: How long the chunks are that go to one worker.
        starting: Seconds until the first cell has begun.
    """

    here: bool
    chunking: Chunking
    starting: float

    def capacity(self, device: str) -> int:
        """How many cells can be measured at a time on a device."""

    def named(self, workers: int) -> str:
        """So many workers, in words."""

    def outcomes(self, task: Task[Any], costs: Mapping[Cell, float], workers: int) -> Iterator[Attempt]:
        """Measure cells, whose seconds are known, by so many workers; the outcomes as they come.

        Closing the iterator stops what is still going on.
        """

    def close(self) -> None:
        """End what was started; it starts again where more is asked for."""


def needed(name: str, executor: str, requirement: str) -> ModuleType:
    """A package that an executor needs.

    Raises:
        UsageError: it is not installed; the message says how to install it.
    """
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise UsageError(
            f"--executor {executor} needs the package {name} ({error}): pip install '{requirement}', or curvlab with its "
            f"extra {executor!r}; --executor local measures without it"
        ) from error
