"""Trains by every structure on a share of each batch: `torchrun … shared_training.py FILE`; alone, on whole batches."""

import os
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from curvlab.fisher import EKFAC, KFAC, Diagonal, Full, Structure, UnitWise
from curvlab.optim import NaturalGradient

STEPS, BATCH = 4, 12


def structures() -> Iterator[tuple[str, Structure, dict[str, Any]]]:
    """Yield structures by names of their own, and which rows they are made of."""
    yield "kfac", KFAC(factored_damping=True, invert_every=2), {"kind": "mc"}
    yield "kfac-plain", KFAC(), {"kind": "exact"}
    yield "kfac-long", KFAC(max_factor=7, factored_damping=True), {"kind": "mc"}
    yield "kfac-batch", KFAC(), {"kind": "empirical", "rows": "batch"}
    yield "ekfac", EKFAC(), {"kind": "mc"}
    yield "diagonal", Diagonal(), {"kind": "empirical"}
    yield "diagonal-signs", Diagonal(), {"kind": "empirical", "rows": "signs", "draws": 2}
    yield "full", Full(), {"kind": "exact"}
    yield "full-batch", Full(), {"kind": "empirical", "rows": "batch"}
    yield "unit-wise", UnitWise(), {"kind": "mc"}


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv1d(2, 3, 2), nn.Tanh(), nn.Flatten(), nn.LayerNorm(12), nn.Linear(12, 6), nn.Tanh(), nn.Linear(6, 3)
    ).double()


def train(rank: int = 0, size: int = 1) -> dict[str, Tensor]:
    """Return the parameters after training, by structure."""
    found = {}
    for name, structure, rows in structures():
        model, loss = network(), nn.CrossEntropyLoss()
        run = DistributedDataParallel(model) if size > 1 else model
        made = NaturalGradient(
            model, loss, 0.2, structure=structure, damping=0.1, momentum=0.5, refresh_every=2, **rows
        )
        for step in range(STEPS):
            generator = torch.Generator().manual_seed(step)
            x = torch.randn(BATCH, 2, 5, dtype=torch.float64, generator=generator).chunk(size)[rank]
            y = torch.randint(3, (BATCH,), generator=generator).chunk(size)[rank]
            made.zero_grad()
            with made.collect():
                loss(run(x), y).backward()
            made.step()
        found[name] = torch.cat([p.detach().flatten() for p in model.parameters()])
    return found


if __name__ == "__main__":
    distributed.init_process_group("gloo")
    trained = train(distributed.get_rank(), distributed.get_world_size())
    torch.save(trained, f"{sys.argv[1]}.{os.environ['RANK']}")
    distributed.destroy_process_group()
