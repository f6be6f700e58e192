"""The way of samples through a model, as far as the graph of a forward pass tells.

Rows are formed from what layers see, entry by entry along the first axis. That is checked by a reverse pass, which need not
be repeated while passes have the same shapes and the same graph, unless the graph moves samples to places that depend on
numbers: sequences that are sorted by length, experts that are sent some of the samples.
"""

from __future__ import annotations

import re
from collections.abc import Hashable
from dataclasses import dataclass

from torch import Tensor
from torch.autograd.graph import Node

_MOVES = re.compile("Index|Gather|Scatter|Sort|Topk|MaskedSelect|Take|Put|PackPadded")
_BUILT_IN = re.compile(r"\d$|AccumulateGrad$")


@dataclass(frozen=True)
class Route:
    """What tells passes apart.

    Attributes:
        functions: digest of the functions between parameters and output.
        fixed: whether none of them may move samples to places that depend on numbers, as functions of one's own may.
    """

    functions: Hashable = ()
    fixed: bool = True

    def stands_for(self, samples: int) -> bool:
        """Whether what is found out about a pass holds for all passes like it, of so many samples."""
        return self.fixed or samples == 1


def route_to(z: Tensor) -> Route:
    """Read the graph of an output. Cost: one visit to each of its functions."""
    names: list[str] = []
    seen: set[Node] = set()
    stack: list[Node | None] = [z.grad_fn]
    while stack:
        function = stack.pop()
        if function is None or function in seen:
            continue
        seen.add(function)
        names.append(function.name())
        stack.extend(following for following, _ in function.next_functions)
    fixed = all(_BUILT_IN.search(name) and not _MOVES.search(name) for name in set(names))
    return Route(hash(tuple(names)), fixed)
