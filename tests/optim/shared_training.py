"""Trains by every structure on a share of each batch: `torchrun … shared_training.py FILE`; alone, on whole batches."""

import sys
from typing import Any

import torch
from natural_gradients import STRUCTURES, natural
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel
from torchrun import leave

from curvlab.optim import LevenbergMarquardt, NaturalGradient

STEPS, BATCH = 4, 12
ADAPTED: dict[str, dict[str, Any]] = {"adapted damping": {}, "quadratic": {"lr": "quadratic"}}
"""Of natural gradient whose steps depend on the loss of the batch."""


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv1d(2, 3, 2), nn.Tanh(), nn.Flatten(), nn.LayerNorm(12), nn.Linear(12, 6), nn.Tanh(), nn.Linear(6, 3)
    ).double()


def train(rank: int = 0, size: int = 1) -> dict[str, Tensor]:
    """Return the parameters after training, by structure."""
    found = {}
    for name in (*STRUCTURES, *ADAPTED):
        model = network()
        run = DistributedDataParallel(model) if size > 1 else model
        if name in ADAPTED:
            made = NaturalGradient(model, nn.CrossEntropyLoss(), damping=LevenbergMarquardt(every=2), **ADAPTED[name])
        else:
            made = natural(model, name, momentum=0.5)
        for step in range(STEPS):
            generator = torch.Generator().manual_seed(step)
            x = torch.randn(BATCH, 2, 5, dtype=torch.float64, generator=generator).chunk(size)[rank]
            y = torch.randint(3, (BATCH,), generator=generator).chunk(size)[rank]
            made.zero_grad()
            with made.collect():
                made.preconditioner.loss(run(x), y).backward()
            made.step()
        found[name] = torch.cat([p.detach().flatten() for p in model.parameters()])
    return found


if __name__ == "__main__":
    distributed.init_process_group("gloo")
    leave(train(distributed.get_rank(), distributed.get_world_size()), sys.argv[1])
