"""One way of tracking in a process of its own: `python -m benchmarks.tracking.worker REQUEST FOLDER`.

Gradient descent trains the network in every process alike, and only the measurements of its Hessian are timed. The
eigenvalues go to `values.npy`.
"""

from __future__ import annotations

import statistics
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks import meter
from benchmarks.process import Machine, Result, serve
from benchmarks.tracking.methods import BLOCK, METHODS, Counted, Found, MethodName
from curvlab.problems.full_batch import full_batch_problem
from curvlab.spectrum import Hessian

TOP = 2
"""Eigenvalues that are followed."""


@dataclass(frozen=True)
class Request(Machine):
    """What to measure.

    Attributes:
        method: how eigenpairs are found.
        samples: training samples N.
        width: hidden units of a layer.
        eta: step size of gradient descent.
        steps: steps of the run.
        every: steps from one measurement to the next.
    """

    method: MethodName
    samples: int
    width: int
    eta: float
    steps: int
    every: int


@dataclass(frozen=True)
class Measurement(Result):
    """What came of it.

    Attributes:
        seconds: all measurements together.
        measurements: how many there were.
        products: products with single vectors that they took.
        residual: the largest residual over its eigenvalue.
        gap: the smallest distance of the two eigenvalues over the first.
        block_seconds: a product with a block of vectors.
        single_seconds: the same products one by one.
        peak_bytes: peak memory of the first measurement.
        parameters: number of parameters P.
    """

    seconds: float = 0.0
    measurements: int = 0
    products: int = 0
    residual: float = 0.0
    gap: float = 0.0
    block_seconds: float = 0.0
    single_seconds: float = 0.0
    peak_bytes: int = 0
    parameters: int = 0


def measure(request: Request) -> tuple[Measurement, Tensor]:
    """Measure in this process; returns the eigenvalues `[measurements, TOP]`, too."""
    meter.use(request.device, request.threads)
    made = full_batch_problem(
        "digits", width=request.width, samples=request.samples, scaling="unit", dtype=torch.float32
    )
    problem = made.to(request.device, torch.float32)
    model, (inputs, targets) = problem.model, problem.train
    hessian = Hessian(model, problem.loss, problem.train, batched=torch.device(request.device).type != "cpu")
    operator, find = Counted(hessian), METHODS[request.method].find
    optimiser = torch.optim.SGD(model.parameters(), lr=request.eta)
    peak = meter.growth(lambda: find(operator, TOP, None), request.device)
    operator.products = 0
    course: list[Found] = []
    seconds = residual = 0.0

    def follow() -> None:
        course.append(find(operator, TOP, course[-1].start if course else None))

    for step in range(request.steps + 1):
        if step % request.every == 0:
            seconds += meter.timed(follow, request.device)
            residual = max(residual, _residual(hessian, course[-1]))
        optimiser.zero_grad()
        problem.loss(model(inputs), targets).backward()
        optimiser.step()
    block, single = _products(hessian, request)
    values = torch.stack([found.values for found in course]).double()
    done = Measurement(
        outcome="done",
        seconds=seconds,
        measurements=len(values),
        products=operator.products,
        residual=residual,
        gap=float((1 - values[:, 1] / values[:, 0]).min()),
        block_seconds=block,
        single_seconds=single,
        peak_bytes=peak,
        parameters=hessian.size,
    )
    return done, values


def _residual(hessian: Hessian, found: Found) -> float:
    values = found.values.to(found.vectors)
    residuals = (hessian.matmat(found.vectors) - values[:, None] * found.vectors).norm(dim=1)
    return float((residuals / values.abs()).max())


def _products(hessian: Hessian, request: Request) -> tuple[float, float]:
    """Time a block of products, and the same one by one, in turns; medians."""
    generator = torch.Generator().manual_seed(0)
    vectors = torch.randn(BLOCK, hessian.size, generator=generator, dtype=hessian.dtype).to(hessian.device)
    blocks, singles = [], []
    for _ in range(request.repeats):
        blocks.append(meter.timed(lambda: hessian.matmat(vectors), request.device))
        singles.append(meter.timed(lambda: [hessian.matmat(v[None]) for v in vectors], request.device))
    return statistics.median(blocks), statistics.median(singles)


def _measure_and_save(request: Request, folder: Path) -> Measurement:
    measurement, values = measure(request)
    np.save(folder / "values.npy", values.numpy(force=True))
    return measurement


if __name__ == "__main__":
    serve(sys.argv[1:], Request, _measure_and_save, Measurement)
