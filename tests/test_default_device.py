"""Results depend on where the model and the data are, not on torch's default device."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from oracle import DOUBLE
from torch import Tensor, nn

import curvlab
from curvlab.fisher import STRUCTURES
from curvlab.nn import TwoLayer, gcn, ntk_mlp
from curvlab.optim import NaturalGradient
from curvlab.problems.two_layer import synthetic_two_layer_problem
from curvlab.spectrum import DenseOperator, Hessian, density, logdet
from curvlab.spectrum.eigen import eigenpairs


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


INPUTS, TARGETS = torch.randn(7, 5, dtype=DOUBLE, generator=generator()), torch.arange(7) % 3
EDGES = torch.tensor([[0, 1, 2, 3], [1, 2, 3, 0]])
SYMMETRIC = torch.diag(torch.linspace(1, 2, 40, dtype=DOUBLE))


def built() -> nn.Module:
    return ntk_mlp((5, 4, 3), "tanh", generator=generator(), dtype=DOUBLE)


def step(network: nn.Module, structure: str, kind: Any) -> list[Tensor]:
    loss = nn.CrossEntropyLoss()
    optimizer = NaturalGradient(network, loss, lr=0.1, structure=structure, kind=kind, kl_clip=None)
    for _ in range(2):
        optimizer.zero_grad()
        with optimizer.collect():
            loss(network(INPUTS), TARGETS).backward()
        optimizer.step()
    return [p.detach() for p in network.parameters()]


def largest(network: nn.Module) -> Tensor:
    return eigenpairs(Hessian(network, nn.CrossEntropyLoss(), (INPUTS, TARGETS)), 3).values


def poisson(network: nn.Module) -> Tensor:
    loss, rates = nn.PoissonNLLLoss(log_input=False), nn.Sequential(network, nn.Softplus())
    counts = INPUTS[:, :3].square().round()
    return curvlab.sqrt_fisher(rates, loss, INPUTS, counts, kind="mc", generator=generator()).gram()


CASES: dict[str, Callable[[nn.Module], Any]] = {
    **{f"{key}-{kind}": partial(step, structure=key, kind=kind) for key in STRUCTURES for kind in ("exact", "mc")},
    "gram": lambda network: curvlab.gram(network, (INPUTS, TARGETS), loss=nn.CrossEntropyLoss(), memory="64KiB"),
    "poisson": poisson,
    "eigenpairs": largest,
    "density": lambda _: density(DenseOperator(SYMMETRIC), probes=3, steps=10).nodes,
    "logdet": lambda _: logdet(DenseOperator(SYMMETRIC), probes=3, steps=10).value,
    "two-layer": lambda _: list(TwoLayer(5, 4, generator=generator()).parameters()),
    "gcn": lambda _: list(gcn(torch.ones(4, 3, device="cpu"), EDGES, (2, 2), generator=generator()).parameters()),
    "problem": lambda _: synthetic_two_layer_problem().train[0],
}


@pytest.mark.parametrize("name", CASES)
def test_the_default_device_has_no_say(name: str) -> None:
    first, second = built(), built()
    expected = CASES[name](first)
    with torch.device("meta"):
        found = CASES[name](second)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
