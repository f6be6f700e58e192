"""Follows a run in every way, each in a process of its own, and compares the eigenvalues."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.process import in_own_process
from benchmarks.tracking.methods import METHODS, TOLERANCE
from benchmarks.tracking.worker import Measurement, Request


@dataclass(frozen=True)
class Entry:
    """One line of the comparison.

    Attributes:
        request: what was measured.
        measurement: what came of it.
        error: largest relative deviation of an eigenvalue from the first method's; None if either is missing.
    """

    request: Request
    measurement: Measurement
    error: float | None

    @property
    def wrong(self) -> bool:
        """Whether it failed for another reason than memory or time, or missed what it promised."""
        if self.measurement.outcome != "done":
            return self.measurement.outcome == "failed"
        missed = not self.measurement.residual <= TOLERANCE
        return METHODS[self.request.method].bounded and (missed or not (self.error or 0.0) <= 2 * TOLERANCE)


def compare(requests: Iterable[Request], timeout: float) -> Iterator[Entry]:
    """Measure one after the other and compare with the first, which is the reference.

    Args:
        requests: one run by several methods.
        timeout: seconds after which a method is stopped.
    """
    reference = None
    for position, request in enumerate(requests):
        with tempfile.TemporaryDirectory() as folder:
            found = in_own_process("benchmarks.tracking.worker", request, timeout, Path(folder), Measurement)
            values = np.load(Path(folder) / "values.npy") if found.outcome == "done" else None
        reference = values if position == 0 else reference
        error = None if values is None or reference is None else float(np.abs(values / reference - 1).max())
        yield Entry(request, found, error)
