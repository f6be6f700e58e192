"""The networks that grow, and what is computed on them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Literal, Self

import torch
from torch import Tensor, nn

from benchmarks.language.methods import LARGEST, fit
from benchmarks.language.models import Block, Shape
from benchmarks.operations import layers_of, operations
from benchmarks.peers import METHODS as GRAM
from benchmarks.structures import kronecker
from benchmarks.structures.tasks import Batch
from curvlab.fisher import KFAC

AxisName = Literal["samples", "outputs", "tokens", "width", "depth", "vocabulary"]
QuantityName = Literal["gram", "kfac", "decoder"]
MethodName = Literal["curvlab", "curvlinops", "nngeometry"]

FEATURES = 64


@dataclass(frozen=True)
class Growing(ABC):
    """What grows along some axes, which are its fields."""

    def grown(self, axis: AxisName, value: int) -> Self:
        """Return another value of one of them."""
        return replace(self, **{axis: value})

    @abstractmethod
    def build(self, device: str) -> Batch:
        """Return network and batch, the same numbers in every process and on every device."""


@dataclass(frozen=True)
class Size(Growing):
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

    def build(self, device: str) -> Batch:  # noqa: D102
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            sizes = [FEATURES, *[self.width] * self.depth, self.outputs]
            layers = [module for i, o in pairwise(sizes) for module in (nn.Linear(i, o), nn.ReLU())]
            network, inputs = nn.Sequential(*layers[:-1]), torch.randn(self.samples, FEATURES)
            targets = torch.randint(self.outputs, (self.samples,))
        return Batch(network.to(device), inputs.to(device), targets.to(device))

    def __str__(self) -> str:
        return (
            f"a ReLU network on {FEATURES} inputs; where they do not grow, N = {self.samples}, C = {self.outputs}, "
            f"width {self.width}, depth {self.depth}"
        )


@dataclass(frozen=True)
class DecoderSize(Growing):
    """A decoder with a loss per token, and its sequences.

    Attributes:
        samples: N.
        tokens: T, of a sequence.
        width: of the residual stream.
        depth: blocks.
        vocabulary: outputs a token.
    """

    samples: int = 4
    tokens: int = 64
    width: int = 128
    depth: int = 2
    vocabulary: int = 512

    def build(self, device: str) -> Batch:  # noqa: D102
        shape = Shape(self.depth, self.width, self.vocabulary, self.samples, self.tokens)
        decoder, tokens, targets = shape.build(device)
        return Batch(decoder, tokens, targets.flatten())

    def __str__(self) -> str:
        return (
            f"a decoder; where they do not grow, {self.samples} × {self.tokens} tokens, width {self.width}, depth {self.depth}, "
            f"vocabulary {self.vocabulary}"
        )


AXES: dict[AxisName, tuple[int, ...]] = {
    "samples": (16, 32, 64, 128, 256, 512),
    "outputs": (4, 8, 16, 32, 64, 128),
    "width": (64, 128, 256, 512, 1024, 2048),
    "depth": (1, 2, 4, 8, 16, 32),
}
"""The values of each of a `Size`, the others as it has them; each is twice the one before."""

DECODER_AXES: dict[AxisName, tuple[int, ...]] = {
    "tokens": (32, 64, 128, 256, 512, 1024),
    "width": (64, 128, 256, 512, 1024, 2048),
    "depth": (1, 2, 4, 8, 16, 32),
    "vocabulary": (256, 512, 1024, 2048, 4096, 8192),
}
"""The values of each of a `DecoderSize`."""


@dataclass(frozen=True)
class Quantity:
    """What is computed.

    Attributes:
        title: in words.
        methods: the ways to compute it.
        operations: counts the multiply-adds that the factored form needs.
        size: what grows.
        least: the smallest of it, to begin with.
        axes: how, with the values of each.
    """

    title: str
    methods: dict[MethodName, Callable[[Batch], Callable[[], object]]]
    operations: Callable[[Batch], int]
    size: Growing = Size()  # frozen
    least: Growing = Size(samples=2, width=8)  # frozen
    axes: Mapping[AxisName, tuple[int, ...]] = field(default_factory=lambda: AXES)


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


def _decoder_operations(batch: Batch) -> int:
    """Count a forward and a backward pass without gradients of parameters, and the second moments of inputs and of rows.

    The outputs' moment is diagonal where it is too long for a matrix.
    """
    tokens, total = batch.inputs.numel(), 0
    for layer in batch.network.modules():
        if isinstance(layer, nn.Linear):
            i, o = layer.in_features + (layer.bias is not None), layer.out_features
            moments = sum(side * (side + 1) // 2 if side <= LARGEST else side for side in (i, o))
            total += tokens * (2 * i * o + moments)
        elif isinstance(layer, Block):
            attention = 2 * batch.inputs.shape[1] * layer.mix.in_features
            total += 3 * tokens * attention
    return total


QUANTITIES: dict[QuantityName, Quantity] = {
    "gram": Quantity("Gram matrix", {"curvlab": _gram("curvlab"), "nngeometry": _gram("nngeometry")}, _gram_operations),
    "kfac": Quantity(
        "K-FAC fit, exact rows",
        {"curvlab": _kfac, "curvlinops": _kfac_curvlinops, "nngeometry": _kfac_nngeometry},
        _kfac_operations,
    ),
    "decoder": Quantity(
        "K-FAC fit, one drawn row a sequence",
        {"curvlab": lambda batch: fit(KFAC)(batch.network, batch.inputs, batch.targets)},
        _decoder_operations,
        DecoderSize(),
        DecoderSize(samples=2, tokens=4, width=64, depth=1, vocabulary=8),
        DECODER_AXES,
    ),
}
