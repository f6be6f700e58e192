"""One Gram matrix in a process of its own: `python -m benchmarks.worker REQUEST FOLDER`.

FOLDER receives the matrix as `gram.npy`, too. A call with two samples loads what is loaded late, and one of full size
gives the peak memory, beyond what the process held before. Then every round times one call and, so that both see the
same machine, each of the task's matrix products once.
"""

from __future__ import annotations

import math
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks import meter
from benchmarks.operations import matrix_products, operations
from benchmarks.peers import METHODS, MethodName
from benchmarks.process import Machine, Timed, serve
from benchmarks.tasks import TASKS, TaskName


@dataclass(frozen=True)
class Request(Machine):
    """What to measure.

    Attributes:
        task: the network.
        method: how its Gram matrix is computed.
        samples: number of samples N.
    """

    task: TaskName
    method: MethodName
    samples: int


@dataclass(frozen=True)
class Measurement(Timed):
    """What came of it.

    Attributes:
        multiply_adds: what the method does of the factored form, symmetric matrices once; None if it works otherwise.
        full_multiply_adds: the same, symmetric matrices in full.
        matmul_rate: largest rate among the task's matrix products, in multiply-adds a second.
    """

    multiply_adds: int | None = None
    full_multiply_adds: int | None = None
    matmul_rate: float | None = None

    @property
    def rates(self) -> tuple[float, ...]:
        """Multiply-adds a second relative to matrix products, symmetric matrices in full and once; none if not counted."""
        if self.multiply_adds is None or self.full_multiply_adds is None or self.matmul_rate is None:
            return ()
        by_products = self.median * self.matmul_rate
        return self.full_multiply_adds / by_products, self.multiply_adds / by_products


def measure(request: Request) -> tuple[Measurement, Tensor]:
    """Measure in this process; returns the matrix, too, as the method scales it."""
    meter.use(request.device, request.threads)
    task, method = TASKS[request.task], METHODS[request.method]
    method.prepare(*task.build(2, request.device))()
    network, inputs = task.build(request.samples, request.device)
    sizes = matrix_products(network, inputs)
    once, full = (
        None if method.operations is None else method.operations(operations(network, inputs, once=once))
        for once in (True, False)
    )
    compute = method.prepare(network, inputs)
    kept: list[Tensor] = []
    peak = meter.growth(lambda: kept.append(compute()), request.device)
    calls = [compute, *(_matrix_product(size, request.device) for size in sizes)]
    seconds, *products = zip(*_rounds(calls, request), strict=True)
    done = Measurement(
        outcome="done",
        seconds=seconds,
        peak_bytes=peak,
        multiply_adds=once,
        full_multiply_adds=full,
        matmul_rate=max(
            math.prod(size) / statistics.median(taken) for size, taken in zip(sizes, products, strict=True)
        ),
    )
    return done, kept[0]


def _rounds(calls: Sequence[Callable[[], object]], request: Request) -> list[list[float]]:
    """Time every call once a round, until there are enough rounds or the first call has used up its time."""
    rounds: list[list[float]] = []
    while len(rounds) < request.repeats and sum(timings[0] for timings in rounds) < request.seconds:
        rounds.append([meter.timed(call, request.device) for call in calls])
    return rounds


def _matrix_product(size: tuple[int, int, int], device: str) -> Callable[[], object]:
    """Return a float32 product `[m, k] @ [k, n]` into memory of its own, after one call of it."""
    m, k, n = size
    left, right, out = (torch.rand(shape, device=device) for shape in ((m, k), (k, n), (m, n)))
    torch.mm(left, right, out=out)
    return lambda: torch.mm(left, right, out=out)


def _measure_and_save(request: Request, folder: Path) -> Measurement:
    measurement, gram = measure(request)
    np.save(folder / "gram.npy", gram.detach().cpu().numpy())
    return measurement


if __name__ == "__main__":
    serve(sys.argv[1:], Request, _measure_and_save, Measurement)
