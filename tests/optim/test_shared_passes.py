"""Two preconditioners of one model."""

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import pytest
import torch
from preconditioner_cases import RHO, data, network
from torch import Tensor, nn

from curvlab.optim import Preconditioner
from curvlab.testing.oracle import assert_close


@pytest.mark.parametrize("second", ["mc", "exact", "empirical"])
@pytest.mark.parametrize("first", ["mc", "ggn", "empirical"])
@pytest.mark.parametrize("structure", ["kfac", "full"])
def test_two_preconditioners_share_a_pass(structure: str, first: Any, second: Any) -> None:
    """One a layer, with structures of their own: each does what it does alone."""
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    loss, x, y = nn.CrossEntropyLoss(), torch.randn(6, 3, dtype=torch.float64), torch.arange(6) % 2

    def make(only: str) -> Preconditioner:
        if only == "0":
            return Preconditioner(model, loss, structure, kind=first, plain=("2",), kl_clip=None)
        return Preconditioner(model, loss, "diagonal", kind=second, plain=("0",), kl_clip=None)

    def step(*layers: str) -> dict[str, Tensor]:
        model.zero_grad()
        made = [make(layer) for layer in layers]
        with ExitStack() as within:
            for preconditioner in made:
                within.enter_context(preconditioner.collect())
            loss(model(x), y).backward()
        for preconditioner in made:
            preconditioner.precondition()
        return {n: p.grad.clone() for n, p in model.named_parameters() if n[0] in layers and p.grad is not None}

    expected = step("0") | step("2")
    for name, found in step("0", "2").items():
        torch.testing.assert_close(found, expected[name])


class BareScale(nn.Module):
    """A parameter without factored rows between two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.scale, self.last = nn.Linear(4, 5), nn.Parameter(torch.randn(5)), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.last(torch.tanh(self.first(x) * self.scale))
        return out


def attention() -> nn.Module:
    inner = nn.TransformerEncoderLayer(2, 1, 3, dropout=0.0, batch_first=True)
    return nn.Sequential(nn.Unflatten(1, (2, 2)), inner, nn.Flatten(), nn.Linear(4, 3))


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("build", [network, BareScale, attention])
def test_two_preconditioners_of_the_same_parameters(build: Callable[[], nn.Module], shared: bool) -> None:
    """In one pass or in turn, each does what it does alone; the second acts on what the first has made of the gradients."""
    torch.manual_seed(0)
    model, loss, (x, y) = build().double(), nn.CrossEntropyLoss(), data()

    def made() -> list[Preconditioner]:
        return [
            Preconditioner(model, loss, "kfac", kind="exact", damping=RHO, kl_clip=None),
            Preconditioner(model, loss, "full", kind="empirical", damping=RHO, kl_clip=None),
        ]

    def passed(*preconditioners: Preconditioner) -> dict[str, Tensor]:
        model.zero_grad()
        with ExitStack() as within:
            for one in preconditioners:
                within.enter_context(one.collect())
            loss(model(x), y).backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    alone = made()
    gradients = [passed(one) for one in alone]
    first = alone[0].direction(gradients[0])
    assert first is not None
    second = alone[1].direction(first if shared else gradients[1])
    together = made()
    if shared:
        passed(*together)
        for one in together:
            one.precondition()
            for name, p in model.named_parameters():
                assert_close(p.grad, (first if one is together[0] else second)[name], 1e-9)
    else:
        for _ in range(2):
            for one, expected in zip(together, (first, second), strict=True):
                passed(one)
                one.precondition()
                for name, p in model.named_parameters():
                    assert_close(p.grad, expected[name], 1e-9)
    assert not any("forward" in vars(module) for module in model.modules())
