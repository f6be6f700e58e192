"""Cases of tests of structures: networks, losses and data, with their rows and dense references."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

import torch
from fisher_oracle import Reference, reference
from oracle import CLASSES, DOUBLE, Architecture, indices, loss_case, vectors
from torch import Tensor, nn

from curvlab.rows import Rows, jacobian, sqrt_fisher
from curvlab.testing.oracle import dense_jacobian, outputs
from curvlab.testing.structures import Language

KINDS = ("exact", "ggn", "mc", "empirical")


class Vision(nn.Module):
    """Grouped and strided convolutions, a normalisation, a bare parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.randn(4, 1, 1))
        self.conv = nn.Conv2d(2, 4, 3, stride=2, groups=2)
        self.norm = nn.BatchNorm2d(4)
        self.last = nn.Linear(16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.gain * self.norm(self.conv(x))).flatten(1))


def perceptron() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, CLASSES))


NETWORKS = {
    "mlp": Architecture("mlp", perceptron, vectors(4)),
    "cnn": Architecture("cnn", Vision, vectors(2, 6, 6), chain=False),
    "sequence": Architecture("sequence", Language, indices(6, 4), chain=False),
}


@dataclass(frozen=True, eq=False)
class Case:
    """A network, a loss and data, with rows and reference."""

    model: nn.Module
    loss: nn.Module
    inputs: Any
    targets: Tensor
    kind: str
    seed: int
    others: Any

    @cached_property
    def rows(self) -> Rows:
        return rows_of(self.model, self.loss, self.inputs, self.targets, self.kind, self.seed)

    @cached_property
    def reference(self) -> Reference:
        return reference(self.model, self.loss, self.inputs, self.targets, self.kind, self.seed)

    @cached_property
    def separate(self) -> Rows:
        """The Jacobian, swept on its own."""
        return jacobian(self.model, self.inputs)

    @property
    def elsewhere(self) -> tuple[Rows, Tensor]:
        """The Jacobian of other samples, as rows and dense."""
        return jacobians(self.model, self.others)


@cache
def jacobians(model: nn.Module, inputs: Tensor) -> tuple[Rows, Tensor]:
    return jacobian(model, inputs), dense_jacobian(model, inputs)


@cache
def network_case(network: str, N: int, seed: int) -> tuple[nn.Module, Tensor, Tensor]:
    """Make a network with inputs, and inputs of three other samples."""
    model, inputs = NETWORKS[network].make(N + 3, seed)
    return model, inputs[:N], inputs[N:]


@cache
def case(
    network: str, loss: str = "ce", reduction: str = "mean", kind: str = "exact", N: int = 4, seed: int = 0
) -> Case:
    """Make a case; `others` are inputs of three other samples."""
    model, inputs, others = network_case(network, N, seed)
    module, targets = loss_case(loss).make(outputs(model, inputs), reduction, seed)
    return Case(model, module, inputs, targets, kind, seed, others)


def rows_of(
    model: nn.Module, loss: nn.Module, inputs: Any, targets: Tensor, kind: str = "exact", seed: int = 0
) -> Rows:
    generator = torch.Generator().manual_seed(seed) if kind == "mc" else None
    return sqrt_fisher(model, loss, inputs, targets, kind, generator=generator)


CUTS = ((0, 1), (1, 4), (4, 6))


def batches(data: Case, cuts: Sequence[tuple[int, int]] = CUTS) -> list[tuple[Tensor, Tensor]]:
    return [(data.inputs[a:b], data.targets[a:b]) for a, b in cuts]


@cache
def rows_and_references(data: Case, cuts: Sequence[tuple[int, int]] = CUTS) -> tuple[list[Rows], list[Reference]]:
    pairs = batches(data, cuts)
    return (
        [rows_of(data.model, data.loss, x, y, data.kind) for x, y in pairs],
        [reference(data.model, data.loss, x, y, data.kind) for x, y in pairs],
    )


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=DOUBLE, generator=torch.Generator().manual_seed(seed))
