"""The autograd engine: rows of any architecture by hooks and batched reverse passes.

The forward pass records, for every layer in the table, its input and the edge of the graph at its output; one batched
`torch.autograd.grad` then brings the seeds to those edges. Parameters whose owner has no rule, or whose owner's forward
pass did not run exactly once, get dense rows per sample by `torch.func` (functorch, now part of torch).
"""

from __future__ import annotations

from collections.abc import Iterator
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


def sweep(model: nn.Module, arguments: Arguments, pick: PickOutput, seed: Seed) -> Swept:
    """Propagate the seeds through the model and keep the rows factored.

    Raises:
        UnsupportedModel: naming the layer and the remedy.
    """
    owners = owners_of(model)
    ruled = [owner for owner in owners if rule_for(owner.module) is not None and not owner.tied]
    with torch.enable_grad(), _recording(ruled) as recorder:
        z = call(model, arguments, pick)
    seeds = seed(z.detach())
    once = [(owner, made) for owner in ruled if (made := recorder.only_call(owner.module)) is not None]
    gradients = _backward(z, [made.edge for _, made in once], seeds)
    layers = [_factored_rows(owner, made, g, seeds) for (owner, made), g in zip(once, gradients, strict=True)]
    factored = {owner.name for owner, _ in once}
    layers += _dense_rows(model, arguments, pick, seeds, [o for o in owners if o.name not in factored])
    return Swept(z.detach(), seeds, in_parameter_order(model, layers))


def _backward(z: Tensor, edges: list[GradientEdge | None], seeds: Tensor) -> list[Tensor | None]:
    """Bring the seeds to the edges, all rows in one pass."""
    reached = [edge for edge in edges if edge is not None]
    if not reached or not z.requires_grad:
        return [None for _ in edges]
    found = iter(torch.autograd.grad(z, reached, seeds, is_grads_batched=True, allow_unused=True))
    return [None if edge is None else next(found) for edge in edges]


def _factored_rows(owner: Owner, made: _Call, g: Tensor | None, seeds: Tensor) -> LayerRows:
    V, N = seeds.shape[:2]
    if made.x.shape[0] != N:
        raise UnsupportedModel(
            f"The input of layer {owner.name!r} has {made.x.shape[0]} entries along its first axis, but the model's "
            f"output has {N} samples. Keep the sample as the first axis of every layer's input."
        )
    rule = rule_for(owner.module)
    assert rule is not None
    g = seeds.new_zeros(V, *made.shape) if g is None else g
    return rule.rows(owner.module, owner.name, owner.layout, owner.names, made.x, g)


def _dense_rows(
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
    V, N = seeds.shape[:2]
    result: list[LayerRows] = []
    for owner in owners:
        layout = owner.layout
        joined = layout.join({name: rows[name].flatten(0, 1) for name in layout.names})
        j = joined.view(N, V, layout.units, layout.width).transpose(0, 1)
        result.append(DenseRows(owner.name, layout, j.contiguous()))
    return result
