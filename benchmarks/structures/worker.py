"""One structure by one method in a process of its own: `python -m benchmarks.structures.worker REQUEST FOLDER`.

FOLDER receives the solution or response as `found.npy`. A call with two samples loads what is loaded late, and one of
full size gives the peak memory, beyond what the process held before; then calls are timed.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import Tensor

from benchmarks import meter
from benchmarks.process import Machine, Timed, serve
from benchmarks.structures.kronecker import MethodName
from benchmarks.structures.methods import QUANTITIES, QuantityName
from benchmarks.structures.tasks import TASKS, TaskName, build


@dataclass(frozen=True)
class Request(Machine):
    """What to measure.

    Attributes:
        task: the network.
        quantity: what is computed.
        method: how.
        samples: number of samples N.
    """

    task: TaskName
    quantity: QuantityName
    method: MethodName
    samples: int


def measure(request: Request) -> tuple[Timed, Tensor]:
    """Measure in this process; returns what was computed, too."""
    meter.use(request.device, request.threads)
    task, prepare = TASKS[request.task], QUANTITIES[request.quantity].methods[request.method]
    prepare(build(task, 2, request.device))()
    compute = prepare(build(task, request.samples, request.device))
    kept: list[Tensor] = []
    peak = meter.growth(lambda: kept.append(compute()), request.device)
    return Timed("done", seconds=meter.repeated(compute, request), peak_bytes=peak), kept[0]


def measure_and_save(request: Request, folder: Path) -> Timed:
    """Measure in this process, and write what was computed."""
    measurement, found = measure(request)
    np.save(folder / "found.npy", found.numpy(force=True))
    return measurement


if __name__ == "__main__":
    serve(sys.argv[1:], Request, measure_and_save, Timed)
