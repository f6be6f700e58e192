"""What a model returned in a pass of the user's, of which the loss takes a tensor, or a function of one.

A loss that is called on `model(x)[:, :-1].reshape(-1, C)`, say, has cotangents there; the model, called on single samples, takes
them at what it returns.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.graph import GradientEdge
from torch.utils._pytree import tree_leaves

from curvlab.rows.graph_signature import edge_of, nearest
from curvlab.rows.reverse import backward
from curvlab.rows.sweep import PickOutput

RESHAPING = tuple(
    f"{name}Backward" for name in ("Alias", "Clone", "ReshapeAlias", "Squeeze", "UnsafeView", "Unsqueeze", "View")
)
"""Functions that leave numbers in their order."""


@dataclass(frozen=True)
class Returned:
    """What a model returned.

    Attributes:
        leaves: tensors and whatever else is in it.
        edges: of the graph at the tensors, before anything changed them.
        bare: whether it is one tensor itself.
        reshaped: whether it is known to be the loss's outputs, perhaps in another shape.
    """

    leaves: Sequence[Any]
    edges: Sequence[GradientEdge | None]
    bare: bool
    reshaped: bool = False

    @classmethod
    def of(cls, value: Any) -> Returned:
        """Take what a model returned apart."""
        leaves = tree_leaves(value)
        edges = [edge_of(leaf) if isinstance(leaf, Tensor) else None for leaf in leaves]
        return cls(leaves, edges, isinstance(value, Tensor))

    def detached(self, z: Tensor) -> Returned:
        """Return the numbers of one tensor without its graph, which tells whether z is it; nothing of more than one."""
        leaves = [leaf.detach() for leaf in self.leaves] if self.bare else []
        return Returned(leaves, [None] * len(leaves), self.bare, self._is_reshaped(z))

    def is_what(self, z: Tensor) -> bool:
        """Whether the loss's outputs z are the tensor that was returned, by the graph or, in its own shape, by its numbers."""
        return self.reshaped or (self.bare and self.leaves[0].shape == z.shape and torch.equal(self.leaves[0], z))

    def _is_reshaped(self, z: Tensor) -> bool:
        at, end = edge_of(z), self.edges[0] if self.bare else None
        if at is None or end is None:
            return False
        node, nr = at.node, at.output_nr
        while (node, nr) != (end.node, end.output_nr):
            (following, nr), *others = node.next_functions or [(None, 0)]
            if not node.name().startswith(RESHAPING) or others or following is None:
                return False
            node = following
        return True

    def behind(
        self, z: Float[Tensor, "N C ..."], cotangents: Float[Tensor, "V N C ..."]
    ) -> tuple[PickOutput, Tensor, Float[Tensor, "V M ..."]] | None:
        """Return the one tensor that the loss's outputs z were computed from: how to pick it, itself, and the cotangents there.

        One number a sample, `[N]`, becomes `[N, 1]`. None if there is no such tensor, or more than one. Cost: a backward pass
        through what lies between.
        """
        found = nearest(z, self.edges)
        if len(found) != 1:
            return None
        (k,) = found
        output = self.leaves[k].detach()
        (at_output,) = backward(z, [self.edges[k]], cotangents, keep=True)
        assert at_output is not None
        if output.ndim > 1:
            return (lambda value: tree_leaves(value)[k]), output, at_output
        return (lambda value: tree_leaves(value)[k][:, None]), output[:, None], at_output[..., None]
