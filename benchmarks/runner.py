"""Runs every method in a process of its own and compares what they computed."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Generic

import numpy as np

from benchmarks.peers import METHODS
from benchmarks.process import Asked, Found, in_own_process
from benchmarks.worker import Measurement, Request

AGREEMENT = 1e-4
"""Largest relative error, in the Frobenius norm, at which float32 matrices agree."""


@dataclass(frozen=True)
class Entry(Generic[Asked, Found]):
    """One line of the comparison.

    Attributes:
        request: what was measured.
        measurement: what came of it.
        error: ‖G − G_ref‖_F / ‖G_ref‖_F for the matrix G without its scale and that of the first method; None if
            either is missing.
    """

    request: Asked
    measurement: Found
    error: float | None

    @property
    def wrong(self) -> bool:
        """Whether it failed for another reason than memory or time, or disagrees."""
        disagrees = self.error is not None and not self.error <= AGREEMENT
        return self.measurement.outcome == "failed" or disagrees


def compare(requests: Iterable[Request], timeout: float) -> Iterator[Entry[Request, Measurement]]:
    """Measure Gram matrices one after the other and compare with the first, which is the reference.

    Args:
        requests: one task by several methods.
        timeout: seconds after which a method is stopped.
    """
    return compared("benchmarks.worker", requests, timeout, Measurement, _unscaled)


def compared(
    worker: str,
    requests: Iterable[Asked],
    timeout: float,
    made: type[Found],
    load: Callable[[Asked, Path], np.ndarray | None],
) -> Iterator[Entry[Asked, Found]]:
    """Measure one after the other and compare with the first, which is the reference.

    Args:
        worker: module that calls `serve`.
        requests: one task by several methods.
        timeout: seconds after which a method is stopped.
        made: class of the measurement.
        load: reads what a method computed from the folder of its process; None if it cannot be compared.
    """
    reference = None
    for position, request in enumerate(requests):
        with tempfile.TemporaryDirectory() as folder:
            measurement = in_own_process(worker, request, timeout, Path(folder), made)
            found = load(request, Path(folder)) if measurement.outcome == "done" else None
        reference = found if position == 0 else reference
        error = None if found is None or reference is None else relative_error(found, reference)
        yield Entry(request, measurement, error)


def _unscaled(request: Request, folder: Path) -> np.ndarray:
    gram: np.ndarray = np.load(folder / "gram.npy").astype(np.float64)
    return gram / METHODS[request.method].scale


def relative_error(found: np.ndarray, reference: np.ndarray) -> float:
    """Return the norm of the difference over that of the reference."""
    return float(np.linalg.norm(found - reference) / np.linalg.norm(reference))
