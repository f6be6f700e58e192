"""Measurements in processes of their own, so that one that wants too much memory or time fails alone.

The parent starts `python -m WORKER REQUEST FOLDER`, REQUEST a `Request` as JSON; the worker leaves `measurement.json`
in FOLDER, and arrays that the parent compares.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import statistics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch

Outcome = Literal["done", "out of memory", "out of time", "not installed", "failed"]


@dataclass(frozen=True, kw_only=True)
class Machine:
    """How a method is timed, and on what.

    Attributes:
        repeats: timed calls.
        seconds: timed work after which no further call starts.
        threads: threads that torch may use.
        device: torch device.
        memory: bytes that the process may allocate, so that a method that wants more fails alone; None for any number.
    """

    repeats: int
    seconds: float
    threads: int
    device: str
    memory: int | None = None


@dataclass(frozen=True)
class Result:
    """What came of a measurement.

    Attributes:
        outcome: "done", or why there are no times.
        note: the reason in words.
    """

    outcome: Outcome
    note: str = ""


@dataclass(frozen=True)
class Timed(Result):
    """What came of calls that were timed.

    Attributes:
        seconds: the timed calls.
        peak_bytes: peak memory of a call, beyond what the process held before.
    """

    seconds: tuple[float, ...] = ()
    peak_bytes: int = 0

    @property
    def median(self) -> float:
        """Median time of a call in seconds."""
        return statistics.median(self.seconds)


Asked = TypeVar("Asked", bound=Machine)
Found = TypeVar("Found", bound=Result)


def in_own_process(worker: str, request: Machine, timeout: float, folder: Path, made: type[Found]) -> Found:
    """Measure in another process.

    Args:
        worker: module that calls `serve`.
        request: what to measure; a dataclass of plain values.
        timeout: seconds after which it is stopped.
        folder: receives what the worker writes.
        made: class of the measurement.
    """
    command = [sys.executable, "-m", worker, json.dumps(asdict(request)), str(folder)]
    settings = _settings(request.threads)
    try:
        done = subprocess.run(command, env=os.environ | settings, capture_output=True, text=True, timeout=timeout)
    except subprocess.TimeoutExpired:
        return made("out of time", f"stopped after {timeout:g} s")
    if done.returncode == -signal.SIGKILL:
        return made("out of memory", "killed by the system")
    if done.returncode:
        return made("failed", (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1])
    stored: dict[str, Any] = json.loads((folder / "measurement.json").read_text())
    fields: dict[str, Any] = {name: tuple(x) if isinstance(x, list) else x for name, x in stored.items()}
    return made(**fields)


def _settings(threads: int) -> dict[str, str]:
    """Return what every process finds in its environment.

    The threads of NumPy and SciPy wait busily, at the expense of those of torch: eigsh takes three times as long. And
    glibc hands large blocks back to the kernel as they are freed, which then clears every page of the next ones: a
    matter of the memory allocator, not of the method, that varies from run to run.
    """
    return {
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        "OPENBLAS_NUM_THREADS": "1",
        "MALLOC_MMAP_MAX_": "0",
        "MALLOC_TRIM_THRESHOLD_": str(1 << 40),
    }


def serve(arguments: list[str], asked: type[Asked], measure: Callable[[Asked, Path], Found], made: type[Found]) -> None:
    """Measure in this process, within the memory allowed, and write what came of it.

    Args:
        arguments: the request as JSON, and the folder.
        asked: class of the request.
        measure: measures, and writes arrays to the folder.
        made: class of the measurement.
    """
    request, folder = asked(**json.loads(arguments[0])), Path(arguments[1])
    if request.memory is not None:
        _, hard = resource.getrlimit(resource.RLIMIT_DATA)
        bound = request.memory if hard == resource.RLIM_INFINITY else min(request.memory, hard)
        resource.setrlimit(resource.RLIMIT_DATA, (bound, hard))
    found = _attempt(lambda: measure(request, folder), made)
    (folder / "measurement.json").write_text(json.dumps(asdict(found)))


def _attempt(measure: Callable[[], Found], made: type[Found]) -> Found:
    try:
        return measure()
    except ModuleNotFoundError as error:
        return made("not installed", str(error))
    except (MemoryError, torch.OutOfMemoryError) as error:
        return made("out of memory", _first_line(error))
    except RuntimeError as error:
        # The CPU allocator has no exception class of its own.
        outcome: Outcome = "out of memory" if "can't allocate memory" in str(error) else "failed"
        return made(outcome, _first_line(error))


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]
