"""Reverse passes to parameters."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from curvlab.rows.parameters import ParameterSpace


def pull(
    outputs: Sequence[Tensor],
    inputs: Sequence[Tensor],
    cotangents: Sequence[Tensor | None] = (None,),
    create_graph: bool = False,
) -> tuple[Tensor, ...]:
    """Return the gradient of outputs with respect to inputs, zero where there is none; keeps the graph."""
    reached = [(y, c) for y, c in zip(outputs, cotangents, strict=True) if y.requires_grad]
    if not reached:
        return tuple(torch.zeros_like(x) for x in inputs)
    return torch.autograd.grad(
        [y for y, _ in reached],
        inputs,
        [c for _, c in reached],
        retain_graph=True,
        create_graph=create_graph,
        materialize_grads=True,
    )


def start(z: Tensor, cotangent: Tensor) -> Tensor:
    """Return a number from which a reverse pass leaves for an output with a cotangent, which it lets go on the way."""
    number: Tensor = _Start.apply(z, [cotangent])  # type: ignore[no-untyped-call]
    return number


class _Start(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor, cotangent: list[Tensor]) -> Tensor:
        ctx.cotangent = cotangent
        return z.new_zeros(())

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor, None]:
        return ctx.cotangent.pop(), None


class Flat:
    """The gradient at leaves as one vector, of which each part is written as soon as the reverse pass brings it.

    Memory: the vector, and the gradient of one parameter at a time.

    Args:
        leaves: by parameter; they have no gradient.
        space: of the parameters.
        read: what is wanted of a gradient; None for zero.
    """

    def __init__(
        self,
        leaves: Mapping[str, Tensor],
        space: ParameterSpace,
        read: Callable[[Tensor], Tensor | None] = lambda gradient: gradient,
    ) -> None:
        self.leaves, self.space, self.read = leaves, space, read
        self._vector: Tensor | None = None
        self._empty: dict[str, Tensor] = {}
        self._parts: dict[str, Tensor] = {}

    def part(self, name: str) -> Tensor:
        """The place of a parameter's gradient, to add to."""
        if self._vector is None:
            # Not before the first gradient arrives, when those at the output are gone.
            like = next(iter(self.leaves.values()))
            self._vector = torch.empty(self.space.size, dtype=like.dtype, device=like.device)
            self._empty = self.space.unflatten(self._vector)
        if name in self._empty:
            self._parts[name] = self._empty.pop(name).zero_()  # a part that nobody has written to takes no memory yet
        return self._parts[name]

    def pull(self, number: Tensor) -> Float[Tensor, " P"]:
        """Return the vector, by a reverse pass from a number."""

        def arrived(name: str, gradient: Tensor | None) -> None:
            if gradient is not None and (value := self.read(gradient)) is not None:
                self.part(name).add_(value)

        def forget(leaf: Tensor) -> None:
            leaf.grad = None

        with ExitStack() as hooks:
            for name, leaf in self.leaves.items():
                hooks.callback(leaf.register_hook(partial(arrived, name)).remove)
                hooks.callback(leaf.register_post_accumulate_grad_hook(forget).remove)
            if number.requires_grad:
                torch.autograd.backward(number, inputs=list(self.leaves.values()))
        for name in self.leaves:
            self.part(name)
        assert self._vector is not None
        return self._vector
