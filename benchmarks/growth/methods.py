"""The networks that grow, and what is computed on them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor, nn

from benchmarks.operations import layers_of, operations
from benchmarks.peers import METHODS as GRAM
from benchmarks.structures import kronecker
from benchmarks.structures.tasks import Batch
from curvlab.fisher import KFAC

AxisName = Literal["samples", "outputs", "width", "depth"]
QuantityName = Literal["gram", "kfac"]
MethodName = Literal["curvlab", "curvlinops", "nngeometry"]

FEATURES = 64


@dataclass(frozen=True)
class Size:
    """A ReLU network on `FEATURES` inputs, and its samples.

    Attributes:
        samples: N.
        outputs: C; there are R = N·C rows.
        width: units of a hidden layer.
        depth: hidden layers; P grows with `depth·width²`.
    """

    samples: int = 64
    outputs: int = 10
    width: int = 256
    depth: int = 2

    def grown(self, axis: AxisName, value: int) -> Size:
        """Return another value of one of them."""
        return replace(self, **{axis: value})

    def build(self, device: str) -> Batch:
        """Return network and batch, the same numbers in every process and on every device."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            sizes = [FEATURES, *[self.width] * self.depth, self.outputs]
            layers = [module for i, o in pairwise(sizes) for module in (nn.Linear(i, o), nn.ReLU())]
            network, inputs = nn.Sequential(*layers[:-1]), torch.randn(self.samples, FEATURES)
            targets = torch.randint(self.outputs, (self.samples,))
        return Batch(network.to(device), inputs.to(device), targets.to(device))


AXES: dict[AxisName, tuple[int, ...]] = {
    "samples": (16, 32, 64, 128, 256, 512),
    "outputs": (4, 8, 16, 32, 64, 128),
    "width": (64, 128, 256, 512, 1024, 2048),
    "depth": (1, 2, 4, 8, 16, 32),
}
"""The values of each, the others as `Size` has them; each is twice the one before."""


@dataclass(frozen=True)
class Quantity:
    """What is computed.

    Attributes:
        title: in words.
        methods: the ways to compute it.
        operations: counts the multiply-adds that the factored form needs.
    """

    title: str
    methods: dict[MethodName, Callable[[Batch], Callable[[], object]]]
    operations: Callable[[Batch], int]


def _gram(method: Literal["curvlab", "nngeometry"]) -> Callable[[Batch], Callable[[], Tensor]]:
    return lambda batch: GRAM[method].prepare(batch.network, batch.inputs)


def _gram_operations(batch: Batch) -> int:
    assert isinstance(batch.network, nn.Sequential)
    count = operations(batch.network, batch.inputs)
    return count.sweep + count.product


def _kfac(batch: Batch) -> Callable[[], object]:
    return lambda: kronecker.fit(batch, KFAC, "exact")


def _kfac_curvlinops(batch: Batch) -> Callable[[], object]:
    return lambda: kronecker.operator(batch, "KFACLinearOperator", "exact").compute_kronecker_factors()


def _kfac_nngeometry(batch: Batch) -> Callable[[], object]:
    layers = kronecker.layers_of(batch.network)
    return lambda: kronecker.matrix(batch, "PMatKFAC", "exact", layers)


def _kfac_operations(batch: Batch) -> int:
    """Count the sweep, and the second moments of inputs and of rows."""
    assert isinstance(batch.network, nn.Sequential)
    layers, C = layers_of(batch.network, batch.inputs)
    N = len(batch.inputs)
    factors = sum(N * (x.inputs * (x.inputs + 1) + C * x.outputs * (x.outputs + 1)) // 2 for x in layers)
    return operations(batch.network, batch.inputs).sweep + factors


QUANTITIES: dict[QuantityName, Quantity] = {
    "gram": Quantity("Gram matrix", {"curvlab": _gram("curvlab"), "nngeometry": _gram("nngeometry")}, _gram_operations),
    "kfac": Quantity(
        "K-FAC fit, exact rows",
        {"curvlab": _kfac, "curvlinops": _kfac_curvlinops, "nngeometry": _kfac_nngeometry},
        _kfac_operations,
    ),
}
