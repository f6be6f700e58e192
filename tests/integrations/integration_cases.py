"""Handwritten digits, two optimisers, and the plain loop that training in a framework is compared with."""

from collections.abc import Callable
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from curvlab.integrations import attach
from curvlab.optim import NaturalGradient, Preconditioner

BATCH = 32


def digits(batches: int) -> TensorDataset:
    """Return the first batches of handwritten digits."""
    found = load_digits()
    x, y = torch.from_numpy(found.data)[: batches * BATCH] / 16, torch.from_numpy(found.target)[: batches * BATCH]
    return TensorDataset(x, y)


def loader(batches: int, dtype: torch.dtype = torch.float64, rank: int = 0, size: int = 1) -> DataLoader[Any]:
    """Return the part of each batch that is that of one process of several."""
    x, y = digits(batches).tensors
    part = BATCH // size
    own = [n for n in range(len(x)) if n % BATCH // part == rank]
    return DataLoader(TensorDataset(x.to(dtype), y), batch_size=part, sampler=own)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 16), nn.Tanh(), nn.Linear(16, 10)).double()


def flat(model: nn.Module) -> Tensor:
    """Return the parameters, flat."""
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def natural_gradient(model: nn.Module, loss: nn.Module) -> torch.optim.Optimizer:
    return NaturalGradient(model, loss, lr=0.3, momentum=0.5, damping=0.05, seed=4)


def preconditioned_adamw(model: nn.Module, loss: nn.Module) -> torch.optim.Optimizer:
    return attach(Preconditioner(model, loss, damping=0.05, seed=4), torch.optim.AdamW(model.parameters(), lr=0.02))


OPTIMISERS: dict[str, Callable[[nn.Module, nn.Module], Any]] = {
    "natural gradient": natural_gradient,
    "preconditioned AdamW": preconditioned_adamw,
}


def plain(optimiser: str, batches: int, accumulate: int = 1, half: bool = False) -> tuple[nn.Module, list[float]]:
    """Train in a plain loop, with `half` in float32 and the model in bfloat16; return it and the loss of every batch."""
    dtype = torch.float32 if half else torch.float64
    model, loss, losses = network().to(dtype), nn.CrossEntropyLoss(), []
    made = OPTIMISERS[optimiser](model, loss)
    for position, (x, y) in enumerate(loader(batches, dtype)):
        with made.preconditioner.collect():
            with torch.autocast("cpu", torch.bfloat16, enabled=half):
                z = model(x)
            value = loss(z.to(dtype), y)
            (value / accumulate).backward()
        losses.append(float(value.detach()))
        if (position + 1) % accumulate == 0:
            made.step()
            made.zero_grad()
    return model, losses
