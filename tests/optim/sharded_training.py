"""Trains a model under `fully_shard`: `torchrun … sharded_training.py FILE STRUCTURE…`; alone, the model as it is."""

import sys
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
from natural_gradients import natural
from torch import Tensor, distributed, nn
from torch.distributed import checkpoint
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_leaves
from torchrun import leave

from curvlab.errors import StateError, UnsupportedModel
from curvlab.optim import ByLayer, NaturalGradient

STEPS, BATCH, WORDS, LENGTH = 4, 12, 7, 5


class Sentences(nn.Module):
    """Embeddings of words and positions, a residual block with a normalisation, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.positions = nn.Embedding(WORDS, 6), nn.Embedding(LENGTH, 6)
        self.block = nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 6))
        self.head = nn.Linear(6, WORDS)

    def forward(self, words: Tensor) -> Tensor:
        x = self.words(words) + self.positions(torch.arange(words.shape[1]))
        return self.head(x + self.block(x)).transpose(1, 2)


def sentences(size: int) -> Sentences:
    torch.manual_seed(0)
    model = Sentences().double()
    if size and distributed.is_initialized():
        mesh = init_device_mesh("cpu", (size,))
        fully_shard(model.block, mesh=mesh)
        fully_shard(model, mesh=mesh)
    return model


def parameters(model: nn.Module) -> Tensor:
    whole = [p.full_tensor() if isinstance(p, DTensor) else p for p in model.parameters()]
    return torch.cat([p.detach().flatten() for p in whole])


def steps(model: nn.Module, made: NaturalGradient, numbers: range, rank: int, size: int) -> None:
    for step in numbers:
        generator = torch.Generator().manual_seed(step)
        x, y = (torch.randint(WORDS, (BATCH, LENGTH), generator=generator).chunk(size)[rank] for _ in range(2))
        made.zero_grad()
        with made.collect():
            made.preconditioner.loss(model(x), y).backward()
        made.step()


def train(name: str, rank: int = 0, size: int = 1) -> dict[str, Any]:
    """Return the parameters after training, how many numbers the state of this process holds, and whether passes are checked."""
    model = sentences(size)
    made = natural(model, name, momentum=0.5, kl_clip=0.1)
    steps(model, made, range(STEPS), rank, size)
    state = made.preconditioner.state_dict()["structure"]["blocks"]
    held = sum(leaf.numel() for leaf in tree_leaves(state) if isinstance(leaf, Tensor))
    return {"parameters": parameters(model), "held": held, "checked": made.preconditioner._checks.announced}


def save_half(name: str, path: str, rank: int = 0, size: int = 1) -> None:
    """Train for half of the steps, and leave a checkpoint."""
    model = sentences(size)
    made = natural(model, name, momentum=0.5, kl_clip=0.1)
    steps(model, made, range(STEPS // 2), rank, size)
    checkpoint.save({"model": model.state_dict(), "natural": ByLayer(made)}, checkpoint_id=path)


def go_on(name: str, path: str, rank: int = 0, size: int = 1) -> Tensor:
    """Return the parameters after the other half of the steps."""
    model = sentences(size)
    made = natural(model, name, momentum=0.5, kl_clip=0.1)
    kept = {"model": model.state_dict(), "natural": ByLayer(made)}
    checkpoint.load(kept, checkpoint_id=path)
    model.load_state_dict(kept["model"])
    steps(model, made, range(STEPS // 2, STEPS), rank, size)
    return parameters(model)


def ignoring(name: str, rank: int = 0, size: int = 1, *, whole: bool = False) -> Tensor:
    """Return the parameters after a step on a batch of which the last process has no target; with whole parameters or not."""
    model, loss = sentences(0 if whole else size), nn.CrossEntropyLoss(ignore_index=0)
    run: nn.Module = DistributedDataParallel(model) if whole else model
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randint(1, WORDS, (BATCH, LENGTH), generator=generator) for _ in range(2))
    y[BATCH // 2 :] = 0
    mine = y.chunk(size)[rank]
    share = size * int((mine != 0).sum()) / int((y != 0).sum())
    made = natural(model, name, loss)
    with made.collect():
        (share * loss(run(x.chunk(size)[rank]), mine)).backward()
    made.step()
    return parameters(model)


def one_layer(size: int = 1) -> Tensor:
    """Return the parameters after a step of a model that has fewer layers than there are processes."""
    torch.manual_seed(0)
    model = nn.Linear(3, 2).double()
    if distributed.is_initialized():
        fully_shard(model, mesh=init_device_mesh("cpu", (size,)))
    made = natural(model, "kfac-exact")
    for _ in range(2):
        made.zero_grad()
        with made.collect():
            made.preconditioner.loss(model(torch.eye(3).double()), torch.tensor([0, 1, 1])).backward()
        made.step()
    return parameters(model)


def refused(size: int) -> dict[str, str]:
    """Return what is said of what cannot be sharded."""
    mesh = init_device_mesh("cpu", (size,))
    y = torch.tensor([0, 1, 1])

    def step(model: nn.Module, **options: Any) -> None:
        made = NaturalGradient(model, nn.CrossEntropyLoss(), **{"lr": 0.1, "kl_clip": None, **options})
        with made.collect():
            made.preconditioner.loss(model(torch.eye(3)), y).backward()
        made.step()

    def cut(model: nn.Module, **options: Any) -> nn.Module:
        fully_shard(model, mesh=mesh, **options)
        return model

    def network() -> nn.Sequential:
        return nn.Sequential(nn.Linear(3, 3 * size), nn.Linear(3 * size, 4), nn.Linear(4, 2))

    class Scaled(nn.Sequential):
        def __init__(self) -> None:
            super().__init__(nn.Linear(3, 2))
            self.scale = nn.Parameter(torch.ones(2))

        def forward(self, x: Tensor) -> Tensor:
            return self.scale * super().forward(x)

    partly = network()
    fully_shard(partly[0], mesh=mesh)
    late = NaturalGradient(model := network(), nn.CrossEntropyLoss(), 0.1, kl_clip=None)
    cut(model)
    made = NaturalGradient(cut(network()), nn.CrossEntropyLoss(), 0.1, kl_clip=None)
    cases: dict[str, Callable[[], Any]] = {
        "full": lambda: step(cut(network()), structure="full"),
        "bare parameter": lambda: step(cut(Scaled())),
        "quadratic": lambda: step(cut(network()), lr="quadratic"),
        "partly": lambda: step(partly),
        "another axis": lambda: step(
            cut(network(), shard_placement_fn=lambda p: Shard(1) if p.shape == (4, 3 * size) else None)
        ),
        "late": lambda: late.collect().__enter__(),
        "rebind": made.preconditioner.rebind,
    }
    said = {}
    for name, case in cases.items():
        try:
            case()
        except (UnsupportedModel, StateError) as error:
            said[name] = str(error)
    return said


if __name__ == "__main__":
    distributed.init_process_group("gloo", timeout=timedelta(seconds=60))
    rank, size = distributed.get_rank(), distributed.get_world_size()
    found: dict[str, Any] = {name: train(name, rank, size) for name in sys.argv[2:]}
    for name in sys.argv[2:]:
        save_half(name, f"{sys.argv[1]}.{name}.several", rank, size)
    found["gone on"] = {name: go_on(name, f"{sys.argv[1]}.{name}.one", rank, size) for name in sys.argv[2:]}
    found["ignoring"] = {
        (name, whole): ignoring(name, rank, size, whole=whole)
        for name in ("kfac", "diagonal", "ekfac")
        for whole in (False, True)
    }
    found["refused"] = refused(size)
    found["one layer"] = one_layer(size)
    leave(found, sys.argv[1])
