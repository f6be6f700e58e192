"""One way of tracking in a process of its own: `python -m benchmarks.tracking.worker REQUEST FOLDER`.

The network takes the parameters of a recorded run, and the measurements of its Hessian are timed. The eigenvalues go to
`values.npy`.
"""

from __future__ import annotations

import statistics
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.utils import vector_to_parameters

from benchmarks import meter
from benchmarks.process import Machine, Result, serve
from benchmarks.tracking.course import Run, problem
from benchmarks.tracking.methods import BLOCK, METHODS, Counted, Found, MethodName
from curvlab.spectrum import Hessian

TOP = 2
"""Eigenvalues that are followed."""


@dataclass(frozen=True, kw_only=True)
class Request(Machine, Run):
    """What to measure.

    Attributes:
        method: how eigenpairs are found.
        course: file with the parameters at every measurement of the run.
    """

    method: MethodName
    course: str


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


def measure(request: Request, course: Float[Tensor, "M P"]) -> tuple[Measurement, Tensor]:
    """Measure in this process; returns the eigenvalues `[measurements, TOP]`, too."""
    meter.use(request.device, request.threads)
    made = problem(request, request.device)
    hessian = Hessian(made.model, made.loss, made.train, batched=torch.device(request.device).type != "cpu")
    operator, find = Counted(hessian), METHODS[request.method].find
    peak = meter.growth(lambda: find(operator, TOP, None), request.device)
    operator.products = 0
    found: list[Found] = []
    seconds = residual = 0.0

    def follow() -> None:
        found.append(find(operator, TOP, found[-1].start if found else None))

    for parameters in course:
        vector_to_parameters(parameters.to(request.device), made.model.parameters())
        seconds += meter.timed(follow, request.device)
        residual = max(residual, _residual(hessian, found[-1]))
    block, single = _products(hessian, request)
    values = torch.stack([pairs.values for pairs in found]).double()
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
    measurement, values = measure(request, torch.load(request.course, weights_only=True))
    np.save(folder / "values.npy", values.numpy(force=True))
    return measurement


if __name__ == "__main__":
    serve(sys.argv[1:], Request, _measure_and_save, Measurement)
