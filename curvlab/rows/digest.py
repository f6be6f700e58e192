"""A digest of the graph of a pass: all that the way of samples through it depends on, in one cheap visit to each function.

It holds, function by function, what that is, the attributes that its rule in `curvlab.rows.apart` reads, and where its inputs come
from; the names of parameters at the ends; and shapes, but for those that follow from the shapes of inputs. By induction from the
ends, functions of two graphs with one digest have the same shapes, and the same is true of both.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping
from typing import Any

import torch
from torch.autograd.graph import Node

from curvlab.rows.apart import FUNCTIONS, Shape

Edge = tuple[Node, int]

LEAF: type[Any] = torch._C._functions.AccumulateGrad  # type: ignore[attr-defined]
"""Type of an end of a graph, where a parameter lies, or another tensor that wants a gradient."""


def digest(roots: Iterable[Node], names: Mapping[int, str]) -> tuple[dict[Node, int], list[Hashable]]:
    """Visit the functions that roots depend on.

    Args:
        roots: where to start.
        names: of the parameters, by id.

    Returns:
        The number of every function, roots first, and the entries of the digest, in the order of these numbers.
    """
    visited: list[Any] = list(dict.fromkeys(roots))
    numbers = {node: number for number, node in enumerate(visited)}
    entries: list[Any] = []
    add, known_number = entries.append, numbers.get
    for node in visited:
        kind = type(node)
        if kind is LEAF:
            entries += (LEAF.__name__, named(node, names), node.variable.shape)
            continue
        function = FUNCTIONS[kind]
        implied = function.implied
        add(function.name or node.name())
        if function.saved:
            entries += function.read(node)
        for other, output in node.next_functions:
            if other is None:
                add(None)
                implied = False
                continue
            number = known_number(other)
            if number is None:
                number = numbers[other] = len(visited)
                visited.append(other)
            add(number)
            if output:
                # Never -1, whose hash is that of -2.
                add(~output)
        if not implied:
            entries += [shape(node, output) for output in range(len(node._input_metadata))]
    return numbers, entries


def named(node: Any, names: Mapping[int, str]) -> str | None:
    """Return the name of the parameter at an end of a graph; None if there is none, or at any other function."""
    return names.get(id(node.variable)) if type(node) is LEAF else None


def shape(node: Node, output: int) -> Shape:
    """Return the shape of an output of a function."""
    found: Shape = tuple(node._input_metadata[output].shape)
    return found
