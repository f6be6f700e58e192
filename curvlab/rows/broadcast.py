"""Parameters that all samples share by broadcasting: class tokens, position embeddings, scales of layers, biases by distance.

Where what has no samples meets what has them,

    x + p,   x - p,   x * p,   where(mask, p, x),   p.expand(N, …),   addmm(p, x, W),   x @ p,   p[index]

the part that a sample has in the gradient at p is the gradient at the function's output, times the other factor, at that sample,
added up over whatever else p is broadcast along, and over the rows of x. From there it goes on to parameters by a reverse pass
through what all samples share, such as a table of biases. The graph tells where that is, that there is no other way to a
parameter, and that no sample enters what is shared: it is made of parameters alone, or has no axis that could be theirs.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node

from curvlab.rows.apart import FUNCTIONS
from curvlab.rows.digest import LEAF, named, shape
from curvlab.rows.graph_signature import Meeting, edge_of, follow
from curvlab.rows.layer import LayerRows
from curvlab.rows.owners import Owner
from curvlab.rows.reverse import backward, pull
from curvlab.rows.single_samples import as_dense

Part = Callable[[Meeting, Tensor, int], Tensor]
"""`(meeting, gradient [V, …] at the function's output, N)` to the parts of N samples `[V, N, …]` at what they share."""

_FACTORS: Mapping[tuple[str, int], Callable[[Any], Tensor | float]] = {
    ("Add", 0): lambda _: 1.0,
    ("Add", 1): lambda node: float(node._saved_alpha),
    ("Sub", 0): lambda _: 1.0,
    ("Sub", 1): lambda node: -float(node._saved_alpha),
    ("Mul", 0): lambda node: node._saved_other,
    ("Mul", 1): lambda node: node._saved_self,
    ("Where", 0): lambda node: node._saved_condition,
    ("Where", 1): lambda node: ~node._saved_condition,
    ("MaskedFill", 0): lambda node: ~node._saved_mask,
    ("Expand", 0): lambda _: 1.0,
    ("Addmm", 0): lambda node: float(node._saved_beta),
    ("Baddbmm", 0): lambda node: float(node._saved_beta),
}
"""What the gradient at the output of a function is multiplied by, at its input of a number."""

_LEFT = {("Mm", 1): "_saved_self", ("Addmm", 2): "_saved_mat1"}
"""Where functions keep the left factor of a matrix product whose right one is their input of a number."""

_OF_CONSTANTS = ("Embedding", "EmbeddingBag", "MaskedFill", "Where")
"""Functions with an input, such as indices or a mask, that is no function of parameters and not in the graph."""


@dataclass(frozen=True)
class Broadcast:
    """Owners of parameters that all samples share, and where these meet the samples.

    Attributes:
        owners: those all of whose parameters act through the meetings alone.
        meetings: with samples, of some of their parameters.
    """

    owners: Sequence[Owner] = ()
    meetings: Sequence[Meeting] = ()

    @property
    def ends(self) -> list[GradientEdge | Tensor]:
        """Where gradients have to arrive for `form`: at the meetings, or, of a single sample, at the parameters."""
        return [GradientEdge(m.node, 0) for m in self.meetings] or list(self._parameters.values())

    @property
    def _parameters(self) -> dict[str, Tensor]:
        return {name: getattr(o.module, local) for o in self.owners for local, name in o.names.items()}

    def rows(self, z: Float[Tensor, "N C ..."], cotangents: Float[Tensor, "V N C ..."]) -> list[LayerRows]:
        """Form the rows of the owners, by a reverse pass of its own; the graph is kept.

        Args:
            z: outputs, in the layout of rows, with their graph.
            cotangents: rows there.
        """
        return self.form(backward(z, self.ends, cotangents, keep=True), cotangents) if self.owners else []

    def form(self, arrived: Sequence[Tensor | None], cotangents: Float[Tensor, "V N C ..."]) -> list[LayerRows]:
        """Form the rows of the owners from what has arrived at the ends, in a graph that is kept. Memory `R·P` of the owners."""
        V, N = cotangents.shape[:2]
        parameters = self._parameters
        if self.meetings:
            arrived = self._through_meetings(arrived, N, list(parameters.values()))
        by_name = {
            name: cotangents.new_zeros(V, N, *p.shape) if g is None else g.reshape(V, N, *p.shape)
            for (name, p), g in zip(parameters.items(), arrived, strict=True)
        }
        return [as_dense(owner, by_name, cotangents) for owner in self.owners]

    def _through_meetings(
        self, arrived: Sequence[Tensor | None], N: int, parameters: Sequence[Tensor]
    ) -> Sequence[Tensor | None]:
        """Bring the parts of samples on to the parameters."""
        pairs = [(m, g) for m, g in zip(self.meetings, arrived, strict=True) if g is not None]
        if not pairs:
            return [None for _ in parameters]
        with torch.no_grad():
            parts = [part(m, g, N).flatten(0, 1) for m, g in pairs if (part := _part(m))]
        return pull([GradientEdge(*m.node.next_functions[m.input]) for m, _ in pairs], parameters, parts, keep=True)


def broadcast(z: Float[Tensor, "N C ..."], owners: Sequence[Owner]) -> Broadcast:
    """Find those among the owners whose parameters all samples share by broadcasting alone.

    Of one sample, all are found. Cost: a visit to each function of the graph.
    """
    end = edge_of(z)
    if not owners or end is None or len(z) == 1:
        return Broadcast(tuple(owners))
    met = follow((end.node, end.output_nr), (), len(z)).meetings
    meetings = [m for m in met if _part(m) and _is_of_none(m.node.next_functions[m.input][0], len(z))]
    names = {id(getattr(o.module, local)): name for o in owners for local, name in o.names.items()}
    otherwise = _reached([end.node], names, {(m.node, m.input) for m in meetings})
    found = tuple(o for o in owners if otherwise.isdisjoint(o.names.values()))
    mine = {name for o in found for name in o.names.values()}
    acting = [m for m in meetings if not mine.isdisjoint(_reached([m.node.next_functions[m.input][0]], names))]
    return Broadcast(found, acting)


def _key(meeting: Meeting) -> tuple[str, int]:
    return FUNCTIONS[type(meeting.node)].name.removesuffix("Backward0"), meeting.input


def _part(meeting: Meeting) -> Part | None:
    """Return how the parts of samples are found there, None if that is not known."""
    key = _key(meeting)
    if key in _FACTORS:
        return _scaled
    of_rows = {("Embedding", 0): _looked_up, **dict.fromkeys(_LEFT, _multiplied)}
    return of_rows.get(key) if meeting.axis == 0 else None


def _is_of_none(root: Node, N: int) -> bool:
    """Whether no sample enters what a function is computed from."""
    seen: set[Node] = set()
    stack, parameters_alone, may_have_samples = [root], True, False
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        following = [other for other, _ in node.next_functions]
        stack.extend(other for other in following if other is not None)
        if type(node) is not LEAF:
            name = FUNCTIONS[type(node)].name.removesuffix("Backward0")
            parameters_alone &= bool(name) and name not in _OF_CONSTANTS and None not in following
            outputs = range(len(node._input_metadata))
            may_have_samples |= any(length % N == 0 for number in outputs for length in shape(node, number))
    return parameters_alone or not may_have_samples


def _reached(roots: Sequence[Node], names: Mapping[int, str], barred: Collection[tuple[Node, int]] = ()) -> set[str]:
    """Return the parameters that functions depend on, but for barred inputs."""
    seen: set[Node] = set()
    found: set[str] = set()
    stack = list(roots)
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        name = named(node, names)
        if name is not None:
            found.add(name)
        stack.extend(
            other
            for number, (other, _) in enumerate(node.next_functions)
            if other is not None and (node, number) not in barred
        )
    return found


def _scaled(meeting: Meeting, g: Float[Tensor, "V ..."], N: int) -> Float[Tensor, "V N ..."]:
    """Multiply, and add up over what the input is broadcast along."""
    at = shape(*meeting.node.next_functions[meeting.input])
    by_sample = (
        (g * _FACTORS[_key(meeting)](meeting.node)).unflatten(meeting.axis + 1, (N, -1)).movedim(meeting.axis + 1, 1)
    )
    axes = (1,) * (by_sample.ndim - 2 - len(at)) + at
    summed: Tensor = by_sample.sum_to_size(*by_sample.shape[:2], *axes)
    return summed.reshape(*by_sample.shape[:2], *at)


def _multiplied(meeting: Meeting, g: Float[Tensor, "V M O"], N: int) -> Float[Tensor, "V N I O"]:
    """Multiply with the rows of a sample in the left factor."""
    left = getattr(meeting.node, _LEFT[_key(meeting)])
    return torch.einsum("nti,vnto->vnio", left.unflatten(0, (N, -1)).to(g.dtype), g.unflatten(1, (N, -1)))


def _looked_up(meeting: Meeting, g: Float[Tensor, "V M ..."], N: int) -> Float[Tensor, "V N U I"]:
    """Add up in the rows of the table that a sample looks up, but for that of padding."""
    node = meeting.node
    index = node._saved_indices.unflatten(0, (N, -1)).flatten(1)
    entries = g.unflatten(1, (N, -1)).flatten(2, -2) * (index != node._saved_padding_idx)[..., None]
    table = g.new_zeros(len(g), N, *shape(*node.next_functions[0]))
    return table.scatter_add_(2, index[..., None].expand_as(entries), entries)
