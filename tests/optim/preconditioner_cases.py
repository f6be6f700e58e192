"""A network, data, and a step of a preconditioner."""

from typing import Any

import torch
from oracle import DOUBLE
from torch import Tensor, nn

from curvlab.fisher import Structure
from curvlab.optim import Preconditioner

RHO = 0.05


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).double()


def data(N: int = 7, seed: int = 1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(N, 4, dtype=DOUBLE, generator=generator), torch.randint(3, (N,), generator=generator)


def options(key: str) -> dict[str, Any]:
    """Options of a structure for three layers; by default, layer-wise would be block-diagonal."""
    return {"sigma": [[1.0, 0.2, 0.0], [0.2, 1.0, 0.2], [0.0, 0.2, 1.0]]} if key == "layer-wise" else {}


def run(pre: Preconditioner, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    """Run a pass and return the plain gradient."""
    pre.model.zero_grad()
    with pre.collect():
        pre.loss(pre.model(x), y).backward()
    return {name: p.grad.clone() for name, p in pre.parameters.items() if p.grad is not None}


def now(pre: Preconditioner) -> Tensor:
    """Return the gradients as they are now, flat."""
    return torch.cat([p.grad.flatten() for p in pre.parameters.values() if p.grad is not None])


def reference(structure: Structure, gradient: dict[str, Tensor], damping: float = RHO) -> Tensor:
    """Return the structure's own solve, flat."""
    solution = structure.solve(gradient, damping)
    assert isinstance(solution, dict)
    return torch.cat([value.flatten() for value in solution.values()])
