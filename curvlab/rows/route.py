"""The way of samples through a model, as the graph of a forward pass tells it.

Rows are formed from what layers see, entry by entry along the first axis, and from the gradients at their outputs. That is right
if a parameter has no other use in the pass, and if whatever lies between a layer and the output keeps samples apart. The
graph tells both, whatever the numbers are: weights of zero, gates that are closed, batches in which nothing is missing.
Where it cannot tell, numbers decide: a reverse pass, for every batch.
"""

from __future__ import annotations

from collections.abc import Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from torch import Tensor
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge

from curvlab.rows.apart import COUPLING, SHARED, Mixes, Shape, follow

Edge = tuple[Node, int]


@dataclass(frozen=True)
class Route:
    """What the graph of a pass tells.

    Attributes:
        functions: digest of the functions between parameters and output.
        reached: parameters that the output depends on; all if None.
        elsewhere: parameters that are used outside the layers that were recorded.
        misplaced: calls of layers whose outputs do not have the samples on their first axis, such as tables of positions.
        unknown: the first function that is not known to keep samples apart, None if all are.
    """

    functions: Hashable = ()
    reached: frozenset[str] | None = None
    elsewhere: frozenset[str] = frozenset()
    misplaced: frozenset[Passed] = frozenset()
    unknown: str | None = None


@runtime_checkable
class Passed(Protocol):
    """One call of a layer."""

    edge: GradientEdge | None
    """Edge of the graph at its output."""
    sources: Sequence[GradientEdge]
    """Edges at its inputs."""


def route_to(
    z: Tensor,
    calls: Collection[Passed],
    parameters: Mapping[str, Tensor],
    samples: int | None,
    *,
    coupled: bool = False,
) -> Route:
    """Read the graph of an output.

    Args:
        z: the output, samples on its first axis, which may hold several positions of each.
        calls: of the layers whose rows may be factored.
        parameters: by name.
        samples: their number; None if they are not the first axis of what layers see.
        coupled: whether samples may interact in batch normalisation.

    Cost: two visits to each function.
    """
    names = {id(p): name for name, p in parameters.items()}
    end = [] if z.grad_fn is None else [z.grad_fn]
    outputs = {(edge.node, edge.output_nr): call for call in calls if (edge := call.edge) is not None}
    sources = [edge.node for call in calls for edge in call.sources]
    elsewhere = _names(_visited([*end, *sources], {node for node, _ in outputs}), names)
    unknown, misplaced = None, frozenset[Passed]()
    if samples is None:
        unknown = "graphs in one batch"
    elif samples > 1 and end:
        unknown, seen, misplaced = _follow(z, outputs, samples, coupled)
    else:
        seen = _visited(end, ())
    if unknown is not None:
        return Route(elsewhere=elsewhere, misplaced=misplaced, unknown=unknown)
    return Route(hash(tuple(map(type, seen))), _names(seen, names), elsewhere, misplaced)


def edge_of(x: Tensor) -> GradientEdge | None:
    """Return the edge of the graph at a tensor, if it has one."""
    return get_gradient_edge(x) if x.requires_grad else None


def nearest(z: Tensor, edges: Sequence[GradientEdge | None]) -> list[int]:
    """Return which edges an output depends on without another of them in between."""
    wanted = {(edge.node, edge.output_nr): k for k, edge in enumerate(edges) if edge is not None}
    found: set[int] = set()
    seen: set[Edge] = set()
    start = edge_of(z)
    stack: list[Edge] = [] if start is None else [(start.node, start.output_nr)]
    while stack:
        at = stack.pop()
        if at in seen:
            continue
        seen.add(at)
        if at in wanted:
            found.add(wanted[at])
        else:
            stack.extend((node, nr) for node, nr in at[0].next_functions if node is not None)
    return sorted(found)


def _visited(roots: Sequence[Node], blocked: Collection[Node]) -> list[Node]:
    """Return the functions that roots depend on, not going through blocked ones."""
    found: list[Node] = []
    seen: set[Node] = set(blocked)
    stack = list(roots)
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        found.append(node)
        stack.extend(following for following, _ in node.next_functions if following is not None)
    return found


def _names(nodes: Collection[Node], names: Mapping[int, str]) -> frozenset[str]:
    """Return the parameters among the ends of a graph."""
    ends = (id(node.variable) for node in nodes if not node.next_functions and hasattr(node, "variable"))
    return frozenset(names[end] for end in ends if end in names)


def _follow(
    z: Tensor, outputs: Mapping[Edge, Passed], samples: int, coupled: bool
) -> tuple[str | None, list[Node], frozenset[Passed]]:
    """Follow the samples from the output to the layers.

    Returns:
        A function on the way that may not keep them apart, the functions that were met, and the calls of layers among them that
        do not have the samples on the first axis of their outputs. What lies behind functions that may mix samples is not met.
    """
    unknown: str | None = None
    misplaced: set[Passed] = set()
    edge = get_gradient_edge(z)
    axes: dict[Edge, int] = {}
    stack: list[tuple[Edge, int]] = [((edge.node, edge.output_nr), 0)]
    while stack:
        at, axis = stack.pop()
        node, name = at[0], at[0].name()
        if at in axes:
            unknown = name if axes[at] != axis else unknown
            continue
        axes[at] = axis
        shape = _shape(at)
        if at in outputs and (axis != 0 or shape[0] % samples):
            misplaced.add(outputs[at])
        following = [None if other is None else (other, nr) for other, nr in node.next_functions]
        inputs = [None if other is None else _shape(other) for other in following]
        found: Sequence[int]
        if axis == SHARED:
            found = [SHARED] * len(following)
        elif shape[axis] % samples:
            unknown = name
            continue
        elif coupled and name in COUPLING:
            found = [axis, *[SHARED] * (len(following) - 1)]
        else:
            try:
                found = follow(node, axis, shape, inputs) if following else ()
            except (Mixes, AttributeError, AssertionError, IndexError):
                unknown = name
                continue
        stack.extend((other, own) for other, own in zip(following, found, strict=True) if other is not None)
    return unknown, list(dict.fromkeys(node for node, _ in axes)), frozenset(misplaced)


def _shape(edge: Edge) -> Shape:
    node, nr = edge
    return tuple(node._input_metadata[nr].shape)
