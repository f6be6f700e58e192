"""The autograd engine: rows of any architecture by hooks and batched reverse passes.

The forward pass records, for every layer in the table, its input and the edge of the graph at its output; one batched
`torch.autograd.grad` then brings the seeds to those edges. Parameters whose owner has no rule, or whose owner's forward
pass did not run exactly once, get dense rows per sample by `torch.func` (functorch, now part of torch).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.func import functional_call, vjp, vmap
from torch.utils._pytree import tree_map

from curvlab.errors import UnsupportedModel
from curvlab.rows.layer import DenseRows, LayerRows
from curvlab.rows.modules import Rule, rule_for
from curvlab.rows.sweep import (
    Owner,
    PickOutput,
    Seed,
    Swept,
    as_arguments,
    call,
    in_parameter_order,
    owners_of,
    select_output,
)


class _Recorder:
    """Records input and output edge of each module's forward pass."""

    def __init__(self) -> None:
        self.calls: dict[nn.Module, list[tuple[Tensor, GradientEdge, torch.Size]]] = {}

    def __call__(self, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        record = (inputs[0].detach(), get_gradient_edge(output), output.shape)
        self.calls.setdefault(module, []).append(record)


@contextmanager
def _recording(owners: list[Owner]) -> Iterator[_Recorder]:
    recorder = _Recorder()
    handles = [owner.module.register_forward_hook(recorder) for owner in owners]
    try:
        yield recorder
    finally:
        for handle in handles:
            handle.remove()


def sweep(model: nn.Module, inputs: Any, pick: PickOutput, seed: Seed) -> Swept:
    """Propagate the seeds through the model and keep the rows factored.

    Raises:
        UnsupportedModel: naming the layer and the remedy.
    """
    owners = owners_of(model)
    ruled = [owner for owner in owners if rule_for(owner.module) is not None and not owner.tied]
    with torch.enable_grad(), _recording(ruled) as recorder:
        z = call(model, inputs, pick)
    seeds = seed(z.detach())
    factored = [owner for owner in ruled if len(recorder.calls.get(owner.module, ())) == 1]
    records = {owner.name: recorder.calls[owner.module][0] for owner in factored}
    gradients = _backward(z, [records[owner.name][1] for owner in factored], seeds)
    layers: list[LayerRows] = []
    for owner, g in zip(factored, gradients, strict=True):
        x, _, shape = records[owner.name]
        if x.shape[0] != z.shape[0]:
            raise UnsupportedModel(
                f"The input of layer {owner.name!r} has {x.shape[0]} entries along its first axis, but the model's output "
                f"has {z.shape[0]} samples. Keep the sample as the first axis of every layer's input."
            )
        rule = rule_for(owner.module)
        assert isinstance(rule, Rule)
        g = seeds.new_zeros(len(seeds), *shape) if g is None else g
        layers.append(rule.rows(owner.module, owner.name, owner.layout, owner.names, x, g))
    rest = [owner for owner in owners if owner.name not in records]
    layers += _dense_rows(model, inputs, pick, seeds, rest)
    return Swept(z.detach(), seeds, in_parameter_order(model, layers))


def _backward(z: Tensor, edges: list[GradientEdge], seeds: Tensor) -> tuple[Tensor | None, ...]:
    if not edges or not z.requires_grad:
        return tuple(None for _ in edges)
    return torch.autograd.grad(z, edges, seeds, is_grads_batched=True, allow_unused=True)


def _dense_rows(
    model: nn.Module, inputs: Any, pick: PickOutput, seeds: Tensor, owners: list[Owner]
) -> list[LayerRows]:
    """Rows of single samples by `torch.func`, for parameters without a factored form. Memory `R·P` of those."""
    if not owners:
        return []
    values = dict(model.named_parameters())
    names = [name for owner in owners for name in owner.names.values()]
    args, kwargs = as_arguments(inputs)
    wanted = {name: values[name].detach() for name in names}

    def of_sample(sample: Any, cotangents: Tensor) -> dict[str, Tensor]:
        single_args, single_kwargs = tree_map(lambda x: x[None], sample)

        def output(parameters: dict[str, Tensor]) -> Tensor:
            result = functional_call(model, parameters, single_args, single_kwargs)
            return select_output(result, pick)[0]

        _, pull = vjp(output, wanted)
        return vmap(lambda c: pull(c)[0])(cotangents)

    try:
        rows = vmap(of_sample, in_dims=(0, 1), out_dims=1)((args, kwargs), seeds)
    except Exception as error:
        raise UnsupportedModel(
            f"The parameters {', '.join(names)} have no factored rows, and torch.func could not form dense ones: {error}"
        ) from error
    result: list[LayerRows] = []
    for owner in owners:
        layout = owner.layout
        V, N = seeds.shape[:2]
        joined = layout.join({name: rows[name].flatten(0, 1) for name in layout.names})
        result.append(DenseRows(owner.name, layout, joined.view(V, N, layout.units, layout.width)))
    return result
