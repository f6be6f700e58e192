"""The way of samples through a model, as the graph of a forward pass tells it.

Rows are formed from what layers see, entry by entry along the first axis, and from the gradients at their outputs. That is right
if a parameter has no other use in the pass, and if whatever lies between a layer and the output keeps samples apart. The
graph tells both, whatever the numbers are: weights of zero, gates that are closed, batches in which nothing is missing.
Where it cannot tell, numbers decide: a reverse pass, for every batch.

What a graph tells depends on its digest alone (`curvlab.rows.digest`), and is kept for graphs of the same.
"""

from __future__ import annotations

from collections.abc import Collection, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge

from curvlab.rows.apart import COUPLING, FUNCTIONS, SHARED, Mixes
from curvlab.rows.digest import Edge, digest, named, shape

LATEST = 256
"""How many graphs are known at a time."""


@dataclass(frozen=True)
class GraphSignature:
    """What the graph of a pass tells.

    Attributes:
        functions: digest of the functions between parameters and output.
        reached: parameters that the output depends on; all if None.
        elsewhere: parameters that are used outside the layers that were recorded.
        misplaced: numbers of the calls whose outputs do not have the samples on their first axis, such as tables of positions.
        unknown: the first function that is not known to keep samples apart, None if all are.
    """

    functions: Hashable = ()
    reached: frozenset[str] | None = None
    elsewhere: frozenset[str] = frozenset()
    misplaced: frozenset[int] = frozenset()
    unknown: str | None = None


Entry = TypeVar("Entry")

Signatures = dict[Hashable, GraphSignature]
"""What graphs have told, by their digests and by what was asked."""


@runtime_checkable
class GraphCall(Protocol):
    """One call of a layer, by its edges in the graph."""

    edge: GradientEdge | None
    """Edge of the graph at its output."""
    sources: Sequence[GradientEdge]
    """Edges at its inputs."""


def signature_of(
    z: Tensor,
    calls: Sequence[GraphCall],
    parameters: Mapping[str, Tensor],
    samples: int | None,
    known: Signatures,
    *,
    coupled: bool = False,
) -> GraphSignature:
    """Read the graph of an output.

    Args:
        z: the output, samples on its first axis, which may hold several positions of each.
        calls: of the layers whose rows may be factored.
        parameters: by name.
        samples: their number; None if they are not the first axis of what layers see.
        known: what other graphs have told; what this one does is added.
        coupled: whether samples may interact in batch normalisation.

    Cost: a visit to each function, some more for a digest that is not known.
    """
    names = {id(p): name for name, p in parameters.items()}
    end = None if z.grad_fn is None else (z.grad_fn, z.output_nr)
    numbers, functions = digest(_ends(end, calls), names)
    asked: list[Hashable] = [samples, coupled, end and end[1]]
    for call in calls:
        at = call.edge
        asked += (None, 0) if at is None else (numbers.get(at.node), at.output_nr)
        asked += (len(call.sources), *(numbers[edge.node] for edge in call.sources))
    key = (*asked, *functions)
    found = known.get(key)
    if found is None:
        found = _read(hash(key), end, calls, names, samples, coupled)
        remember(known, key, found, LATEST)
    return found


def edge_of(x: Tensor) -> GradientEdge | None:
    """Return the edge of the graph at a tensor, if it has one."""
    return get_gradient_edge(x) if x.requires_grad and torch.is_grad_enabled() else None


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


def deepest(edges: Sequence[GradientEdge]) -> list[GradientEdge]:
    """Return the edges that depend on none of the others, so that a reverse pass to them goes through all."""
    wanted = {edge.node for edge in edges}
    above: set[Node] = set()
    """Functions that depend on an edge."""
    done: set[Node] = set()
    stack: list[tuple[Node, bool]] = [(node, False) for node in wanted]
    while stack:
        node, visited = stack.pop()
        following = [other for other, _ in node.next_functions if other is not None]
        if visited:
            if any(other in wanted or other in above for other in following):
                above.add(node)
        elif node not in done:
            done.add(node)
            stack.append((node, True))
            stack.extend((other, False) for other in following)
    return [edge for edge in edges if edge.node not in above]


def remember(table: dict[Hashable, Entry], key: Hashable, entry: Entry, most: int) -> None:
    """Add an entry to a table of so many at most, which forgets the oldest."""
    table[key] = entry
    if len(table) > most:
        del table[next(iter(table))]


def _ends(end: Edge | None, calls: Sequence[GraphCall]) -> Iterator[Node]:
    """Yield the function that an output is of, and those that the inputs of layers are of."""
    if end is not None:
        yield end[0]
    for call in calls:
        for edge in call.sources:
            yield edge.node


def _read(
    functions: Hashable,
    end: Edge | None,
    calls: Sequence[GraphCall],
    names: Mapping[int, str],
    samples: int | None,
    coupled: bool,
) -> GraphSignature:
    """Tell what follows from a digest."""
    outputs = {(edge.node, edge.output_nr) for call in calls if (edge := call.edge) is not None}
    way = Way()
    if samples is None:
        way = Way("graphs in one batch")
    elif samples > 1 and end is not None:
        way = follow(end, outputs, samples, coupled=coupled)
    return GraphSignature(
        functions=functions,
        reached=_reached([] if end is None else [end[0]], (), names),
        elsewhere=_reached(_ends(end, calls), {node for node, _ in outputs}, names),
        misplaced=frozenset(
            number
            for number, call in enumerate(calls)
            if (edge := call.edge) is not None and (edge.node, edge.output_nr) in way.misplaced
        ),
        unknown=way.unknown,
    )


def _reached(roots: Iterable[Node], blocked: Collection[Node], names: Mapping[int, str]) -> frozenset[str]:
    """Return the parameters that functions depend on, not going through blocked ones."""
    seen, stack, found = set(blocked), list(roots), set[str]()
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        stack.extend(following for following, _ in node.next_functions if following is not None)
        name = named(node, names)
        if name is not None:
            found.add(name)
    return frozenset(found)


@dataclass(frozen=True)
class Meeting:
    """An input of a function that all samples share, beside others that have samples.

    Attributes:
        node: the function.
        input: number of the input.
        axis: of the samples in the function's output.
    """

    node: Any
    input: int
    axis: int


@dataclass(frozen=True)
class Way:
    """The way of samples from an output to the layers.

    Attributes:
        unknown: a function on the way that may not keep them apart, None if all are known to.
        misplaced: the outputs of layers among those that were met that do not have the samples on the first axis. What lies
            behind functions that may mix samples is not met.
        meetings: with what all samples share; none if some function is met in two ways.
    """

    unknown: str | None = None
    misplaced: Collection[Edge] = ()
    meetings: Sequence[Meeting] = ()


def follow(end: Edge, outputs: Collection[Edge], samples: int, *, coupled: bool = False) -> Way:
    """Follow a number of samples from an output, where they are the first axis, through functions and layers."""
    unknown: str | None = None
    misplaced: set[Edge] = set()
    axes: dict[Edge, int] = {}
    meetings: list[Meeting] = []
    twice = False
    stack = [(end, 0)]
    while stack:
        at, axis = stack.pop()
        node = at[0]
        if at in axes:
            if axes[at] != axis:
                unknown, twice = node.name(), True
            continue
        axes[at] = axis
        out = shape(*at)
        if at in outputs and (axis != 0 or out[0] % samples):
            misplaced.add(at)
        following = [None if other is None else (other, output) for other, output in node.next_functions]
        found: Sequence[int]
        if axis == SHARED:
            found = [SHARED] * len(following)
        elif out[axis] % samples:
            unknown = node.name()
            continue
        elif not following:
            continue
        elif coupled and FUNCTIONS[type(node)].name in COUPLING:
            found = [axis, *[SHARED] * (len(following) - 1)]
        else:
            inputs = [None if other is None else shape(*other) for other in following]
            try:
                found = FUNCTIONS[type(node)].follow(node, axis, out, inputs)
            except (Mixes, AssertionError, IndexError):
                unknown = node.name()
                continue
            meetings += [
                Meeting(node, number, axis)
                for number, (other, own) in enumerate(zip(following, found, strict=True))
                if other is not None and own == SHARED
            ]
        stack.extend((other, own) for other, own in zip(following, found, strict=True) if other is not None)
    return Way(unknown, misplaced, () if twice else meetings)
