"""Forward passes of the layers that own parameters, and the rows that they make together.

A layer that ran several times, and layers that share a parameter, are one layer at more positions: the row of a block
is the sum over all calls.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from inspect import signature
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch._C._functorch import is_functorch_wrapped_tensor
from torch.autograd.graph import GradientEdge
from torch.utils.hooks import RemovableHandle

from curvlab.rows.factored import EmbeddingRows, KroneckerRows
from curvlab.rows.graph_signature import GraphSignature, edge_of
from curvlab.rows.layer import DenseRows, LayerRows
from curvlab.rows.modules import OWN, Inputs, LayerUse, is_batch, rule_for
from curvlab.rows.owners import Owner
from curvlab.rows.parameters import Layout
from curvlab.rows.samples import Samples
from curvlab.rows.tied import TiedRows


@dataclass(eq=False)
class Call:
    """One forward pass of a module.

    Attributes:
        use: the module.
        inputs: the tensors that it was called on.
        of_tensors: whether it was called on tensors alone, all by position.
        shape: shape of its output.
        edge: edge of the graph at its output, None without a gradient.
        sources: edges at those inputs that depend on parameters.
        gradient: gradient at its output, once a backward pass that is listened to has brought it.
        arrived: what to do then.
    """

    use: LayerUse
    inputs: Inputs
    of_tensors: bool
    shape: torch.Size
    edge: GradientEdge | None
    sources: Sequence[GradientEdge]
    gradient: Tensor | None = None
    arrived: Callable[[Call], None] | None = None

    def take_if_awaited(self, gradient: Tensor) -> None:
        """Take the gradient at the output, if something is to be done with it."""
        if self.arrived is not None:
            self.gradient = gradient.detach()
            self.arrived(self)

    def forget(self, *, inputs: bool) -> None:
        """Let go of the gradient, and of what the module was called on if `inputs`."""
        self.gradient = None
        if inputs:
            self.inputs = ()


class Recorder:
    """Records the forward passes of the modules that use the parameters of some owners.

    Args:
        owners: those for which all these modules have rules.
    """

    def __init__(self, owners: Sequence[Owner]) -> None:
        self._owners = owners
        self._calls: dict[LayerUse, list[Call]] = {use: [] for owner in owners for use in owner.uses}
        self._unfit: set[LayerUse] = set()  # layers with a call that cannot be followed

    def hook(
        self, made: Callable[[Call, Tensor], None] | None = None, watching: Callable[[], bool] = lambda: True
    ) -> list[RemovableHandle]:
        """Hook the modules, ahead of the user's own hooks, which may change an output.

        Args:
            made: called with every call and its output, before anything else sees the output.
            watching: whether a call counts.
        """
        return [
            use.module.register_forward_hook(
                partial(self._on_call, made, watching, use), prepend=True, with_kwargs=True
            )
            for use in self._calls
        ]

    def _on_call(
        self,
        made: Callable[[Call, Tensor], None] | None,
        watching: Callable[[], bool],
        use: LayerUse,
        module: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        output: Any,
    ) -> None:
        if not watching():
            return
        if not isinstance(output, Tensor):
            self._unfit.add(use)
            return
        named = signature(module.forward).bind(*args, **kwargs).arguments if kwargs else dict(enumerate(args))
        tensors = [x for x in named.values() if isinstance(x, Tensor)]
        if any(is_functorch_wrapped_tensor(x) for x in (*tensors, output)):
            # Within torch.func, where the first axis is not that of the samples and nothing outlives the transform.
            self._unfit.add(use)
            return
        sources = [edge for x in tensors if (edge := edge_of(x)) is not None]
        of_tensors = not kwargs and len(tensors) == len(args)
        call = Call(use, tuple(x.detach() for x in tensors), of_tensors, output.shape, edge_of(output), sources)
        self._calls[use].append(call)
        if made is not None:
            made(call, output)

    @property
    def made(self) -> list[Call]:
        """All calls."""
        return [call for calls in self._calls.values() for call in calls]

    def calls(self, samples: Samples, count: int, graph_signature: GraphSignature) -> dict[Owner, list[Call]]:
        """Return the calls of every owner that can be factored: with samples on the first axis of its inputs.

        Args:
            samples: what a sample is.
            count: their number N.
            graph_signature: which parameters and calls the graph leaves out.
        """
        found = {owner: [call for use in owner.uses for call in self._calls[use]] for owner in self._owners}
        made = self.made
        misplaced = {made[number] for number in graph_signature.misplaced}
        return {
            owner: calls
            for owner, calls in found.items()
            if calls
            and self._unfit.isdisjoint(owner.uses)
            and graph_signature.elsewhere.isdisjoint(owner.names.values())
            and misplaced.isdisjoint(calls)
            and all(_has_samples_first(call, samples, count) for call in calls)
        }

    def shared(self, samples: Samples, count: int, graph_signature: GraphSignature) -> list[Call]:
        """Return the last calls of layers that were called on tensors without samples on their first axis only; see `calls`."""
        made = self.made
        misplaced = {made[number] for number in graph_signature.misplaced}
        return [
            calls[-1]
            for use, calls in self._calls.items()
            if calls
            and use not in self._unfit
            and all(
                call.inputs and (call in misplaced or not _has_samples_first(call, samples, count)) for call in calls
            )
        ]


def _has_samples_first(call: Call, samples: Samples, count: int) -> bool:
    """Whether the first input of a call is a tensor with the samples on its first axis.

    A layer that is called again for its rows has to be called on tensors alone, and no nodes or edges may interact in it.
    """
    if not call.inputs or (rule_for(call.use.module) is OWN and (samples.interact or not call.of_tensors)):
        return False
    x = call.inputs[0]
    return is_batch(call.use.module, x) and samples.fit(x, call.shape[0], count)


def form(
    owner: Owner, gradients: Mapping[Call, Tensor], samples: Samples, count: int, *, defer: bool = False
) -> LayerRows:
    """Form the rows of an owner, of a number of samples, from the rows `[V, N, *output]` at the outputs of its calls.

    Args:
        owner: of the parameters.
        gradients: rows at the outputs.
        samples: what a sample is.
        count: their number N.
        defer: whether inputs may be unfolded when they are first asked for, as nothing will have changed them.
    """
    parts = [samples.form(call.use, call.inputs, g, count) for call, g in gradients.items()]
    if not defer:
        for part in parts:
            _ = part.factors
    if len(parts) == 1:
        (rows,) = parts
        return rows if rows.layout == owner.layout else rows.restrict(owner.layout.names)
    return _as_positions(owner, parts) or _as_sum(owner, parts)


def _as_positions(owner: Owner, parts: Sequence[LayerRows]) -> LayerRows | None:
    """Append the positions of all calls that have factored rows of one kind; calls of two kinds are those of a tied table."""
    heads = [part for part in parts if isinstance(part, KroneckerRows) and part.lengths is None]
    tables = [part for part in parts if isinstance(part, EmbeddingRows) and part.lengths is None]
    if len(heads) + len(tables) < len(parts):
        return None
    head, table = _one_head(owner, heads), _one_table(owner, tables)
    if not (heads and tables):
        return head or table
    return TiedRows(owner.name, owner.layout, table, head) if head and table and head.a.shape[2] == 1 else None


def _one_head(owner: Owner, parts: Sequence[KroneckerRows]) -> KroneckerRows | None:
    """Append positions, if there is an equal number of them in every group."""
    if len({(part.layout.units, part.a.shape[2]) for part in parts}) != 1:
        return None
    a = torch.cat([_columns(part.a, part.layout, owner.layout) for part in parts], dim=1)
    g = parts[0].g if len(parts) == 1 else torch.cat([part.g for part in parts], dim=2)
    return KroneckerRows(owner.name, owner.layout, a, g)


def _one_table(owner: Owner, parts: Sequence[EmbeddingRows]) -> EmbeddingRows | None:
    if not parts:
        return None
    index = torch.cat([part.index for part in parts], dim=1)
    g = torch.cat([_columns(part.g, part.layout, owner.layout) for part in parts], dim=2)
    return EmbeddingRows(owner.name, owner.layout, index, g)


def _columns(x: Float[Tensor, "*K I"], own: Layout, layout: Layout) -> Float[Tensor, "*K J"]:
    """Bring the columns of a layout to those of another, zero where that has parameters that the former has not."""
    slots = {slot.name: slot for slot in own.slots}
    columns = [
        x[..., slots[slot.name].start : slots[slot.name].stop]
        if slot.name in slots
        else x.new_zeros(*x.shape[:-1], slot.stop - slot.start)
        for slot in layout.slots
    ]
    return torch.cat(columns, dim=-1)


def _as_sum(owner: Owner, parts: Sequence[LayerRows]) -> DenseRows:
    """Add up formed rows. Memory `R·P_l`."""
    total: dict[str, Tensor] = {}
    for part in parts:
        for name, value in part.layout.split(part.dense()).items():
            if name in owner.layout.names:
                total[name] = total[name] + value if name in total else value
    joined = owner.layout.join(total)
    return DenseRows(owner.name, owner.layout, joined.view(*parts[0].shape, owner.layout.units, owner.layout.width))
