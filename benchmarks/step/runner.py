"""Runs every kind of step in a process of its own and compares the directions."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import nn

from benchmarks.process import in_own_process
from benchmarks.runner import AGREEMENT, relative_error
from benchmarks.step.methods import METHODS
from benchmarks.step.worker import Measurement, Request
from benchmarks.tasks import TASKS


@dataclass(frozen=True)
class Entry:
    """One line of the comparison.

    Attributes:
        request: what was measured.
        measurement: what came of it.
        error: how far the checked direction is from curvlab's, or, in dual form, its relative residual; None if there is
            nothing to compare with.
        slower: the step's ratio to gradient descent over that of curvlab's K-FAC with the same interval; None if there
            is no such step.
    """

    request: Request
    measurement: Measurement
    error: float | None = None
    slower: float | None = None

    @property
    def wrong(self) -> bool:
        """Whether it failed for another reason than memory or time, disagrees, or does not learn."""
        if self.measurement.outcome != "done":
            return self.measurement.outcome == "failed"
        before, after = self.measurement.losses
        learns = math.isfinite(after) and after < before
        return not learns or (self.error is not None and not self.error <= AGREEMENT)


def compare(requests: Iterable[Request], timeout: float) -> Iterator[Entry]:
    """Measure one after the other; K-FAC's with the same interval are compared with curvlab's, which comes first.

    Args:
        requests: one task on one batch by several methods.
        timeout: seconds after which a method is stopped.
    """
    references: dict[int, tuple[Measurement, np.ndarray]] = {}
    for request in requests:
        with tempfile.TemporaryDirectory() as folder:
            found = in_own_process("benchmarks.step.worker", request, timeout, Path(folder), Measurement)
            direction = np.load(Path(folder) / "direction.npy") if found.outcome == "done" else None
        error, slower = found.residual, None
        if direction is not None and request.method == "kfac":
            references[request.interval] = found, direction
        elif direction is not None and request.method.startswith("kfac") and request.interval in references:
            own, reference = references[request.interval]
            error = relative_error(direction, reference) if _comparable(request) else None
            slower = found.ratio / own.ratio
        yield Entry(request, found, error, slower)


def _comparable(request: Request) -> bool:
    """Whether the method's factors are curvlab's on this network."""
    convolves = any(isinstance(module, nn.Conv2d) for module in TASKS[request.task].network())
    return METHODS[request.method].expands or not convolves
