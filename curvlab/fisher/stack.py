"""Rows of a block that falls into B equal blocks: a stack of matrices `X_b [n, w]`, formed or factored.

A block's vectors `[K, P_b]` are those of its equal blocks side by side, `P_b = B·w`. Coefficients of its rows are `[B, n, K]`,
the right-hand sides of a batched solve.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from curvlab.rows.layer import LayerRows
from curvlab.rows.rows import gram
from curvlab.rows.side_by_side import combine, dense, gram64, moment, times


class Stack(ABC):
    """Matrices X_b."""

    symmetric: ClassVar[bool] = False
    """Whether `gram` is symmetric to the last bit."""
    scaled: ClassVar[bool] = False
    """Whether rows differ in norm by design, so that short ones are not null ones: see `System`."""
    shortened: ClassVar[bool] = False
    """Whether there are fewer rows than those of the layers, with the same `X_bᵀX_b`."""

    @abstractmethod
    def gram(self) -> Float[Tensor, "B n n"]:
        """Return `X_b X_bᵀ`."""

    @abstractmethod
    def times(self, x: Float[Tensor, "K P_b"]) -> Float[Tensor, "B n K"]:
        """Return `X_b x_b`."""

    @abstractmethod
    def combine(self, c: Float[Tensor, "B n K"]) -> Float[Tensor, "K P_b"]:
        """Return `X_bᵀ c_b`."""

    def coefficients(self, c: Float[Tensor, "K R"]) -> Float[Tensor, "B n K"]:
        """Return c_b with `X_bᵀ c_b` the share of the block in `Sᵀc`."""
        return c.T[None]

    def condition_number(self) -> float | None:
        """Return the largest condition number of a matrix on its range, where it is not that of `gram`."""
        return None


class RowStack(Stack):
    """All rows of the layers, not shortened: what a sandwich is made of, too."""

    @abstractmethod
    def dense(self) -> Float[Tensor, "B R w"]:
        """Form the rows."""

    @abstractmethod
    def against(self, other: Stack, part: slice = slice(None)) -> Float[Tensor, "b R n"]:
        """Return `X_b Y_bᵀ` with the rows of others, for some of the blocks."""

    @abstractmethod
    def contract(self, x: Float[Tensor, "B w K"]) -> Float[Tensor, "R K"]:
        """Return `Σ_b X_b x_b`."""


@dataclass(frozen=True, eq=False)
class FactoredStack(RowStack):
    """The rows of one block over whole layers, factored."""

    layers: Sequence[LayerRows]

    symmetric = True

    def gram(self) -> Float[Tensor, "1 R R"]:  # noqa: D102
        return gram(self.layers, self.layers)[None]

    def times(self, x: Float[Tensor, "K P_b"]) -> Float[Tensor, "1 R K"]:  # noqa: D102
        return times(self.layers, x).T[None]

    def combine(self, c: Float[Tensor, "1 R K"]) -> Float[Tensor, "K P_b"]:  # noqa: D102
        return combine(self.layers, c[0].T)

    def dense(self) -> Float[Tensor, "1 R P_b"]:  # noqa: D102
        return dense(self.layers)[None]

    def against(self, other: Stack, part: slice = slice(None)) -> Float[Tensor, "1 R S"]:  # noqa: ARG002, D102
        assert isinstance(other, FactoredStack)
        return gram(self.layers, other.layers)[None]

    def contract(self, x: Float[Tensor, "1 P_b K"]) -> Float[Tensor, "R K"]:  # noqa: D102
        return times(self.layers, x[0].T).T

    def shares_inputs(self, layers: Sequence[LayerRows]) -> bool:
        """Whether other rows of these layers have the very same inputs."""
        return all(mine.shares_inputs(theirs) for mine, theirs in zip(self.layers, layers, strict=True))

    def times_total(self, layers: Sequence[LayerRows]) -> Float[Tensor, "1 R 1"]:
        """Multiply with the sum of other rows."""
        pairs = zip(self.layers, layers, strict=True)
        return torch.stack([mine.times_total(theirs) for mine, theirs in pairs]).sum(0)[None, :, None]

    def taken_from(self, layers: Sequence[LayerRows], c: Float[Tensor, "1 R 1"], scale: float) -> dict[str, Tensor]:
        """Return `scale·(Σ others − Xᵀc)` by parameter, for other rows that share inputs, one a sample."""
        found: dict[str, Tensor] = {}
        for mine, theirs in zip(self.layers, layers, strict=True):
            found.update(theirs.minus(mine, c[0, :, 0]).scale(scale).total_by_parameter())
        return found


@dataclass(frozen=True, eq=False)
class DenseStack(RowStack):
    """Rows that were formed."""

    x: Float[Tensor, "B R w"]

    def gram(self) -> Float[Tensor, "B R R"]:  # noqa: D102
        return self.x @ self.x.mT

    def times(self, x: Float[Tensor, "K P_b"]) -> Float[Tensor, "B R K"]:  # noqa: D102
        return torch.einsum("bri,kbi->brk", self.x, x.view(len(x), len(self.x), -1))

    def combine(self, c: Float[Tensor, "B R K"]) -> Float[Tensor, "K P_b"]:  # noqa: D102
        return torch.einsum("bri,brk->kbi", self.x, c).flatten(1)

    def coefficients(self, c: Float[Tensor, "K R"]) -> Float[Tensor, "B R K"]:  # noqa: D102
        return c.T.expand(len(self.x), -1, -1)

    def dense(self) -> Float[Tensor, "B R w"]:  # noqa: D102
        return self.x

    def against(self, other: Stack, part: slice = slice(None)) -> Float[Tensor, "b R n"]:  # noqa: D102
        if isinstance(other, DenseStack):
            return self.x[part] @ other.x[part].mT
        return other.times(self.x.transpose(0, 1).flatten(1))[part].mT

    def contract(self, x: Float[Tensor, "B w K"]) -> Float[Tensor, "R K"]:  # noqa: D102
        return (self.x @ x).sum(0)


class Cut(ABC):
    """How layers fall into equal blocks.

    Attributes:
        index: entries of the layer that they cover, block after block; all in their order if None.
        count: number of blocks B.
    """

    index: Int[Tensor, " P_b"] | None = None
    count: int = 1
    sums: ClassVar[bool] = False
    """Whether solves take sums of rows that share the inputs of the state's."""

    @abstractmethod
    def rows(self, layers: Sequence[LayerRows]) -> RowStack:
        """Return the rows of every block."""

    def root(self, layers: Sequence[LayerRows]) -> Stack:
        """Return matrices with as few rows as there can be that have the same `X_bᵀX_b`."""
        return self.rows(layers)

    def row_size(self, layers: Sequence[LayerRows]) -> int:
        """Return the number of rows of the root."""
        return layers[0].count

    @abstractmethod
    def moment(self, layers: Sequence[LayerRows]) -> Float[Tensor, "B w w"]:
        """Form `X_bᵀX_b`."""

    def precise_gram(self, layers: Sequence[LayerRows]) -> Float[Tensor, "B n n"]:
        """Form the root's Gram matrices in float64."""
        return self.root([layer.to(torch.float64) for layer in layers]).gram()

    @abstractmethod
    def title(self, name: str) -> str:
        """Return what messages call the blocks of layers with a name."""


@dataclass(frozen=True, eq=False)
class WholeLayers(Cut):
    """One block of whole layers."""

    sums = True

    def rows(self, layers: Sequence[LayerRows]) -> FactoredStack:  # noqa: D102
        return FactoredStack(layers)

    def moment(self, layers: Sequence[LayerRows]) -> Float[Tensor, "1 P_b P_b"]:  # noqa: D102
        return moment(layers)[None]

    def precise_gram(self, layers: Sequence[LayerRows]) -> Float[Tensor, "1 R R"]:  # noqa: D102
        return gram64(layers)[None]

    def title(self, name: str) -> str:  # noqa: D102
        return f"block {name!r}"
