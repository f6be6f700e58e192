"""Runs every method in a process of its own and compares the matrices."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.peers import METHODS, MethodName
from benchmarks.process import in_own_process
from benchmarks.worker import Measurement, Request

AGREEMENT = 1e-4
"""Largest relative error, in the Frobenius norm, at which float32 matrices agree."""


@dataclass(frozen=True)
class Entry:
    """One line of the comparison.

    Attributes:
        request: what was measured.
        measurement: what came of it.
        error: ‖G − G_ref‖_F / ‖G_ref‖_F for the matrix G without its scale and that of the first method; None if
            either is missing.
    """

    request: Request
    measurement: Measurement
    error: float | None

    @property
    def wrong(self) -> bool:
        """Whether it failed for another reason than memory or time, or disagrees."""
        disagrees = self.error is not None and not self.error <= AGREEMENT
        return self.measurement.outcome == "failed" or disagrees


def compare(requests: Iterable[Request], timeout: float) -> Iterator[Entry]:
    """Measure one after the other and compare with the first, which is the reference.

    Args:
        requests: one task by several methods.
        timeout: seconds after which a method is stopped.
    """
    reference = None
    for position, request in enumerate(requests):
        with tempfile.TemporaryDirectory() as folder:
            measurement = in_own_process("benchmarks.worker", request, timeout, Path(folder), Measurement)
            gram = _unscaled(request.method, Path(folder)) if measurement.outcome == "done" else None
        reference = gram if position == 0 else reference
        error = None if gram is None or reference is None else relative_error(gram, reference)
        yield Entry(request, measurement, error)


def _unscaled(method: MethodName, folder: Path) -> np.ndarray:
    gram: np.ndarray = np.load(folder / "gram.npy").astype(np.float64)
    return gram / METHODS[method].scale


def relative_error(found: np.ndarray, reference: np.ndarray) -> float:
    """Return the norm of the difference over that of the reference."""
    return float(np.linalg.norm(found - reference) / np.linalg.norm(reference))
