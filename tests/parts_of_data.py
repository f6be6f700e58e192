"""Fits structures to a part of the data in every process, and multiplies: `torchrun … parts_of_data.py FILE STRUCTURE…`."""

import sys
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torchrun import leave

import curvlab
from curvlab.errors import StateError
from curvlab.fisher import (
    EKFAC,
    KFAC,
    BlockDiagonal,
    BlockMeans,
    ComponentWise,
    Diagonal,
    Full,
    InputSide,
    LayerWise,
    PartialTraces,
    PartialTracesDiagonal,
    Structure,
    UnitWise,
)
from curvlab.spectrum import GGN, Fisher, Hessian

SAMPLES = 21

FITS: dict[str, Callable[..., Structure]] = {
    "kfac": KFAC.fit,
    "ekfac": EKFAC.fit,
    "diagonal": lambda *data, **how: Diagonal.fit(*data, **{**how, "kind": "empirical"}),
    "component-wise": ComponentWise.fit,
    "partial-traces": lambda *data, **how: PartialTraces.fit(*data, max_factor=5, **how),
    "partial-traces-diagonal": PartialTracesDiagonal.fit,
    "input-side": InputSide.fit,
    "block-means": BlockMeans.fit,
    "full": Full.fit,
    "kfac-reduce": lambda *data, **how: KFAC.fit(*data, sharing="reduce", max_factor=5, **{**how, "kind": "empirical"}),
    "full-parameters": lambda *data, **how: Full.fit(*data, side="parameters", **how),
    "block-diagonal": BlockDiagonal.fit,
    "unit-wise": UnitWise.fit,
    "layer-wise": lambda *data, **how: LayerWise.fit(
        *data, sigma=[[1.0, 0.5, 0.0], [0.5, 1.0, 0.5], [0.0, 0.5, 1.0]], **how
    ),
}


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv1d(2, 3, 2), nn.Tanh(), nn.Flatten(), nn.LayerNorm(12), nn.Linear(12, 3)).double()


def batches(rank: int = 0, size: int = 1) -> list[tuple[Tensor, Tensor]]:
    """Return all batches, or those of one process, of which there are fewer in the last one; some have no target."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(SAMPLES, 2, 5, dtype=torch.float64, generator=generator)
    y = torch.randint(3, (SAMPLES,), generator=generator)
    y[-8:] = -100
    return [(x[k : k + 4], y[k : k + 4]) for k in range(0, SAMPLES, 4)][rank::size]


def fitted(name: str, reduction: str, rank: int = 0, size: int = 1, model: nn.Module | None = None) -> dict[str, Any]:
    """Return what can be seen of a structure, fitted to all data together."""
    group = distributed.group.WORLD if size > 1 else None
    loss = nn.CrossEntropyLoss(reduction=reduction)
    structure = FITS[name](model or network(), loss, batches(rank, size), group=group)
    direction = torch.linspace(-1, 1, structure.space.size, dtype=torch.float64)
    return {
        "matrix": structure.to_dense(),
        "solution": structure.solve(direction, 0.1),
        "count": structure.count,
    }


def products(rank: int = 0, size: int = 1, model: nn.Module | None = None) -> dict[str, Tensor]:
    """Return the matrices of operators and a Gram matrix, of all data together."""
    group = distributed.group.WORLD if size > 1 else None
    loss, data, model = nn.CrossEntropyLoss(), batches(rank, size), model or network()
    inputs = torch.cat([x for x, _ in batches()])
    targets = torch.cat([y for _, y in batches()]).clamp_min(0)
    added = nn.CrossEntropyLoss(reduction="sum")
    return {
        "hessian": Hessian(model, loss, data, group=group).to_dense(),
        "hessian of a sum": Hessian(model, added, data, group=group).to_dense(),
        "ggn": GGN(model, loss, data, group=group).to_dense(),
        "fisher": Fisher(model, loss, data, kind="empirical", group=group).to_dense(),
        "fisher of a sum": Fisher(model, added, data, group=group).to_dense(),
        "gram": curvlab.gram(model, inputs, group=group),
        "gram of a loss": curvlab.gram(model, (inputs, targets), loss=loss, memory="100KiB", group=group),
    }


def failing(rank: int) -> str:
    """Return what a process says when the last one has a batch that is none."""
    data: Any = batches(rank, 2) if rank == 0 else [*batches(rank, 2), "nonsense"]
    try:
        KFAC.fit(network(), nn.CrossEntropyLoss(), data, group=distributed.group.WORLD)
    except (StateError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


if __name__ == "__main__":
    distributed.init_process_group("gloo", timeout=timedelta(seconds=60))
    rank, size = distributed.get_rank(), distributed.get_world_size()
    file, *names = sys.argv[1:]
    sharded = network()
    mesh = init_device_mesh("cpu", (size,))
    fully_shard(sharded[4], mesh=mesh)
    fully_shard(sharded, mesh=mesh)
    models = {"plain": network(), "averaged": DistributedDataParallel(network()), "sharded": sharded}
    found: dict[str, Any] = {}
    for number, name in enumerate(names):
        for reduction in ("mean", "sum"):
            for kind in models if number == 0 else ("plain",):
                found[f"{name} {reduction} {kind}"] = fitted(name, reduction, rank, size, models[kind])
    found["products"] = {kind: products(rank, size, models[kind]) for kind in ("plain", "sharded")}
    found["failing"] = failing(rank)
    leave(found, file)
