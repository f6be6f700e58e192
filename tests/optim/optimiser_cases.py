"""Networks, data, and a step of the optimiser."""

from typing import Any

import torch
from oracle import DOUBLE
from torch import Tensor, nn

from curvlab.optim import NaturalGradient

RHO = 0.05


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()


def data(N: int = 12, seed: int = 1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(N, 4, dtype=DOUBLE, generator=generator), torch.randint(3, (N,), generator=generator)


def optimiser(model: nn.Module, loss: nn.Module | None = None, **options: Any) -> NaturalGradient:
    defaults: dict[str, Any] = {"lr": 0.3, "structure": "full", "kind": "exact", "damping": RHO, "kl_clip": None}
    return NaturalGradient(model, loss or nn.CrossEntropyLoss(), **defaults | options)


def take(made: NaturalGradient, x: Tensor, y: Tensor) -> None:
    """Take a step."""
    made.zero_grad()
    with made.collect():
        made.preconditioner.loss(made.preconditioner.model(x), y).backward()
    made.step()


def flat(model: nn.Module) -> Tensor:
    """Return the parameters, flat."""
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def linear() -> tuple[nn.Module, Tensor, Tensor]:
    """Return a linear model with inputs and targets."""
    torch.manual_seed(0)
    model = nn.Linear(9, 2, bias=False).double()
    return model, torch.randn(6, 9, dtype=DOUBLE), torch.randn(6, 2, dtype=DOUBLE)


class Partial(nn.Module):
    """A layer that gradients do not reach in front of one that they do."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.unreached, self.last = nn.Linear(4, 5).double(), nn.Linear(5, 3).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.unreached(x).detach())
