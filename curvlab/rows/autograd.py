"""The autograd engine: rows of any architecture by hooks and batched reverse passes.

The forward pass records, for every layer in the table, its input and the edge of the graph at its output; one batched
`torch.autograd.grad` then brings the seeds to those edges. Parameters whose owner has no rule, or whose owner's forward
pass did not run exactly once, get dense rows per sample by `torch.func` (functorch, now part of torch).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.func import functional_call, vjp, vmap
from torch.utils._pytree import tree_map, tree_map_only

from curvlab.errors import UnsupportedModel
from curvlab.rows.layer import DenseRows, LayerRows
from curvlab.rows.modules import rule_for
from curvlab.rows.products import chunks
from curvlab.rows.samples import Samples
from curvlab.rows.sweep import (
    Arguments,
    Owner,
    PickOutput,
    Seed,
    Swept,
    call,
    in_parameter_order,
    owners_of,
    select_output,
)

MESSAGES = 8
"""Elements of messages along the edges of a graph relative to those of the largest output of a layer, at a guess."""


@dataclass(frozen=True)
class _Call:
    """One forward pass of a layer: its input, and the shape and edge of its output (none without a gradient)."""

    x: Tensor
    shape: torch.Size
    edge: GradientEdge | None


class _Recorder:
    """Records the forward passes of modules."""

    def __init__(self) -> None:
        self.calls: dict[nn.Module, list[_Call]] = {}

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
        x = args[0] if args else next(iter(kwargs.values()))
        edge = get_gradient_edge(output) if output.requires_grad else None
        self.calls.setdefault(module, []).append(_Call(x.detach(), output.shape, edge))

    def only_call(self, module: nn.Module) -> _Call | None:
        """Return a module's forward pass if there was exactly one."""
        calls = self.calls.get(module, [])
        return calls[0] if len(calls) == 1 else None


@contextmanager
def _recording(owners: list[Owner]) -> Iterator[_Recorder]:
    """Hook the owners, ahead of the user's own hooks, which may change an output."""
    recorder = _Recorder()
    handles = [o.module.register_forward_hook(recorder, prepend=True, with_kwargs=True) for o in owners]
    try:
        yield recorder
    finally:
        for handle in handles:
            handle.remove()


def sweep(model: nn.Module, arguments: Arguments, pick: PickOutput, seed: Seed, samples: Samples) -> Swept:
    """Propagate the seeds through the model and keep the rows factored.

    Raises:
        UnsupportedModel: naming the layer and the remedy.
    """
    owners = owners_of(model)
    ruled = [owner for owner in owners if rule_for(owner.module) is not None and not owner.tied]
    with torch.enable_grad(), _recording(ruled) as recorder:
        chosen = samples.choose(call(model, arguments, pick))
        z = samples.lay_out(chosen)
    seeds = seed(chosen.detach())
    once = [
        (owner, made)
        for owner in ruled
        if (made := recorder.only_call(owner.module)) is not None and samples.cover(len(made.x))
    ]
    factored = {owner.name for owner, _ in once}
    others = [owner for owner in owners if owner.name not in factored]
    edges = [made.edge for _, made in once]
    if samples.interact:
        largest = max((made.shape.numel() for _, made in once), default=1)
        gradients, dense = backward_over_graphs(z, edges, seeds, others, chunks(len(seeds), MESSAGES * largest))
    else:
        gradients = _backward(z, edges, seeds)
        dense = dense_rows(model, arguments, pick, seeds, others)
    layers = [_factored_rows(owner, made, g, seeds, samples) for (owner, made), g in zip(once, gradients, strict=True)]
    return Swept(chosen.detach(), seeds, in_parameter_order(model, [*layers, *dense]))


def _backward(
    z: Tensor, edges: Sequence[GradientEdge | Tensor | None], seeds: Tensor, *, keep: bool = False
) -> list[Tensor | None]:
    """Bring the seeds to the edges, all rows in one pass."""
    reached: Any = [edge for edge in edges if edge is not None]
    if not reached or not z.requires_grad:
        return [None for _ in edges]
    found = iter(torch.autograd.grad(z, reached, seeds, is_grads_batched=True, allow_unused=True, retain_graph=keep))
    return [None if edge is None else next(found) for edge in edges]


def backward_over_graphs(
    z: Tensor, edges: Sequence[GradientEdge | None], seeds: Tensor, others: Sequence[Owner], parts: Iterable[slice]
) -> tuple[list[Tensor | None], list[LayerRows]]:
    """Bring the seeds to the edges, some rows at a time, and form the rows of parameters without a factored form.

    Those take a reverse pass a graph, which for one graph is the same. Memory `R·P` of them.
    """
    parts = list(parts)
    parameters = [owner.module._parameters[local] for owner in others for local in owner.names]

    def bring(z: Tensor, to: Sequence[GradientEdge | Tensor | None], seeds: Tensor) -> list[Tensor | None]:
        found = [_backward(z, to, seeds[part], keep=True) for part in parts]
        return [
            torch.cat(pieces) if (pieces := [g for g in gs if g is not None]) else None
            for gs in zip(*found, strict=True)
        ]

    first = bring(z, [*edges, *parameters] if len(z) == 1 else edges, seeds)
    found = [first[len(edges) :]] if len(z) == 1 else [bring(z[n], parameters, seeds[:, n]) for n in range(len(z))]
    names = [name for owner in others for name in owner.names.values()]
    rows = {
        name: torch.stack([seeds.new_zeros(len(seeds), *p.shape) if g is None else g for g in gradients], dim=1)
        for name, p, gradients in zip(names, parameters, zip(*found, strict=True), strict=True)
        if p is not None
    }
    return first[: len(edges)], [_as_dense(owner, rows, seeds) for owner in others]


def _factored_rows(owner: Owner, made: _Call, g: Tensor | None, seeds: Tensor, samples: Samples) -> LayerRows:
    V, N = seeds.shape[:2]
    if samples.grouping(made.x) is None and len(made.x) != N:
        raise UnsupportedModel(
            f"The input of layer {owner.name!r} has {len(made.x)} entries along its first axis, but the model's "
            f"output has {N} samples. Keep the sample as the first axis of every layer's input; where samples are the "
            "nodes of a graph, say with nodes= which of them carry rows."
        )
    return samples.form(owner, made.x, seeds.new_zeros(V, *made.shape) if g is None else g)


def dense_rows(
    model: nn.Module, arguments: Arguments, pick: PickOutput, seeds: Tensor, owners: list[Owner]
) -> list[LayerRows]:
    """Rows of single samples by `torch.func`, for parameters without a factored form. Memory `R·P` of those."""
    if not owners:
        return []
    values = {name: parameter.detach() for name, parameter in model.named_parameters()}
    names = [name for owner in owners for name in owner.names.values()]

    def of_sample(sample: Arguments, cotangents: Tensor) -> dict[str, Tensor]:
        args, kwargs = tree_map_only(Tensor, lambda x: x[None], sample)

        def output(parameters: dict[str, Tensor]) -> Tensor:
            return select_output(functional_call(model, {**values, **parameters}, args, kwargs), pick)[0]

        pull = vjp(output, {name: values[name] for name in names})[1]
        rows: dict[str, Tensor] = vmap(lambda c: pull(c)[0])(cotangents)
        return rows

    sample_axes = tree_map(lambda x: 0 if isinstance(x, Tensor) else None, arguments)
    try:
        rows = vmap(of_sample, in_dims=(sample_axes, 1))(arguments, seeds)
    except Exception as error:
        raise UnsupportedModel(
            f"The parameters {', '.join(names)} have no factored rows, and torch.func could not form dense ones: "
            f"{error}"
        ) from error
    return [
        _as_dense(owner, {name: rows[name].transpose(0, 1) for name in owner.layout.names}, seeds) for owner in owners
    ]


def _as_dense(owner: Owner, rows: dict[str, Tensor], seeds: Tensor) -> LayerRows:
    """Lay out gradients `[V, N, *shape]` of an owner's parameters."""
    layout = owner.layout
    joined = layout.join({name: rows[name].flatten(0, 1) for name in layout.names})
    return DenseRows(owner.name, layout, joined.view(*seeds.shape[:2], layout.units, layout.width))
