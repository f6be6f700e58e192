"""Partitions that need to know what a tensor is for: heads, neurons and tokens, as Adam-mini has them."""

from collections.abc import Mapping

import torch
from jaxtyping import Int64
from torch import Tensor, nn

from curvlab.rows.parameters import ParameterSpace
from curvlab.spectrum import Partition
from curvlab.spectrum.blocks import layer_of

HEAD, NEURON, TOKEN, BIAS, OTHER = "head", "neuron", "token", "bias", "other"
BLOCKS = (HEAD, NEURON, TOKEN)
"""Kinds of matrices that are cut within, by what."""


def kinds(model: nn.Module) -> dict[str, tuple[str, int]]:
    """By parameter: what Adam-mini cuts it by, and into how many blocks of consecutive rows.

    Queries and keys by head; embeddings and the last matrix, which gives the outputs, by token; other matrices by neuron;
    biases of matrices entry by entry; the rest not at all.
    """
    modules = dict(model.named_modules())
    shapes = {name: p.shape for name, p in model.named_parameters() if p.requires_grad}
    matrices = {layer_of(name) for name, shape in shapes.items() if len(shape) > 1}
    last = max((name for name, shape in shapes.items() if len(shape) > 1), key=list(shapes).index, default="")
    found = {}
    for name, shape in shapes.items():
        layer = layer_of(name)
        heads = _heads(modules, layer)
        if len(shape) < 2:
            found[name] = (BIAS, shape.numel()) if layer in matrices else (OTHER, 1)
        elif heads:
            found[name] = (HEAD, heads)
        elif isinstance(modules.get(layer), nn.Embedding) or name == last:
            found[name] = (TOKEN, shape[0])
        else:
            found[name] = (NEURON, shape[0])
    return found


def _heads(modules: Mapping[str, nn.Module], layer: str) -> int:
    """Number of heads of a layer that gives queries or keys, else 0."""
    above, _, name = layer.rpartition(".")
    return int(getattr(modules.get(above), "heads", 0)) if name in ("query", "key") else 0


def adam_mini(model: nn.Module, space: ParameterSpace) -> Partition:
    """Adam-mini's blocks of all parameters; the matrix of values is one block, as its authors advise for short runs."""
    known = kinds(model)

    def blocks(name: str, _: torch.Size) -> list[str]:
        number = 1 if layer_of(name).rpartition(".")[2] == "value" and known[name][0] == NEURON else known[name][1]
        return [f"{name}[{part}]" for part in range(number)]

    return Partition.of(space, blocks)


def shuffled(partition: Partition, generator: torch.Generator) -> Partition:
    """Blocks of the same sizes of parameters at random."""
    order = torch.randperm(len(partition.labels), generator=generator)
    return Partition(partition.names, partition.labels[order])


def rows_of(shape: torch.Size, parts: int) -> Int64[Tensor, " P"]:
    """Blocks of consecutive rows of a matrix."""
    return torch.arange(parts, device="cpu").repeat_interleave(shape.numel() // parts)


def columns_of(shape: torch.Size, parts: int) -> Int64[Tensor, " P"]:
    """As many blocks of consecutive columns as come nearest, at most one a column."""
    columns = shape[1:].numel()
    number = max(k for k in range(1, min(parts, columns) + 1) if columns % k == 0)
    return torch.arange(number, device="cpu").repeat_interleave(columns // number).repeat(shape[0])


def balanced_queries(model: nn.Module, space: ParameterSpace, ratio: float) -> Tensor | None:
    """Factors of a diagonal change of parameters that leaves attention as it is; None without queries and keys.

    Queries with their biases are multiplied by c and keys by 1/c, head by head, so that ‖W_Q‖ = ratio·‖W_K‖.
    """
    modules = dict(model.named_modules())
    factors = {name: torch.ones(shape, dtype=torch.float64, device="cpu") for name, shape in space.shapes.items()}
    found = False
    for name in modules:
        query, key = modules.get(f"{name}.query"), modules.get(f"{name}.key")
        if not (isinstance(query, nn.Linear) and isinstance(key, nn.Linear)):
            continue
        found = True
        heads = _heads(modules, f"{name}.query") or 1
        norms = [layer.weight.detach().double().cpu().reshape(heads, -1).norm(dim=1) for layer in (query, key)]
        scale = (ratio * norms[1] / norms[0]).sqrt()
        for part, by in (("query", scale), ("key", 1 / scale)):
            for kind in ("weight", "bias"):
                tensor = factors.get(f"{name}.{part}.{kind}")
                if tensor is not None:
                    tensor.view(heads, -1).mul_(by[:, None])
    return space.flatten(factors) if found else None
