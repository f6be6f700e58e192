"""Runs every method in a process of its own and compares the matrices."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from benchmarks.peers import METHODS, MethodName
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
            measurement = _in_own_process(request, timeout, Path(folder))
            gram = _unscaled(request.method, Path(folder)) if measurement.outcome == "done" else None
        reference = gram if position == 0 else reference
        error = None if gram is None or reference is None else _relative_error(gram, reference)
        yield Entry(request, measurement, error)


def _in_own_process(request: Request, timeout: float, folder: Path) -> Measurement:
    command = [sys.executable, "-m", "benchmarks.worker", json.dumps(asdict(request)), str(folder)]
    threads = {name: str(request.threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")}
    try:
        done = subprocess.run(command, env=os.environ | threads, capture_output=True, text=True, timeout=timeout)
    except subprocess.TimeoutExpired:
        return Measurement("out of time", f"stopped after {timeout:g} s")
    if done.returncode == -signal.SIGKILL:
        return Measurement("out of memory", "killed by the system")
    if done.returncode:
        return Measurement("failed", (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1])
    entries = json.loads((folder / "measurement.json").read_text())
    return Measurement(**entries | {"seconds": tuple(entries["seconds"])})


def _unscaled(method: MethodName, folder: Path) -> np.ndarray:
    gram: np.ndarray = np.load(folder / "gram.npy").astype(np.float64)
    return gram / METHODS[method].scale


def _relative_error(gram: np.ndarray, reference: np.ndarray) -> float:
    return float(np.linalg.norm(gram - reference) / np.linalg.norm(reference))
