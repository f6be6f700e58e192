"""The diagonal of the Fisher matrix."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from curvlab.fisher.block import Batch, Block, BlockState, RowRelation, RunningAverage, Total, check_rtol
from curvlab.fisher.on_vectors import weighted_product
from curvlab.fisher.power import Power
from curvlab.fisher.structure import Structure
from curvlab.fisher.system import inverse_values, rank_tolerance
from curvlab.rows import Rows
from curvlab.rows.layer import LayerRows
from curvlab.rows.parameters import Layout
from curvlab.tools.looks import Look


class DiagonalBlock(Block):
    """The diagonal of one layer's block, or some entries of it."""

    def __init__(self, name: str, layout: Layout, rtol: float | None, index: Int[Tensor, " P_b"] | None = None) -> None:
        super().__init__(name, [layout], index)
        self.rtol = rtol
        self.average = RunningAverage()

    def update(self, batch: Batch) -> None:  # noqa: D102
        batch.average(self.average, self._entries(batch.layers[0].diagonal()))

    def add_up(self, total: Total) -> None:  # noqa: D102
        self.average.add_up(total)

    def _entries(self, x: Float[Tensor, "*K P_l"]) -> Float[Tensor, "*K P_b"]:
        return x if self.index is None else x[..., self.index]

    @property
    def values(self) -> Float[Tensor, " P_b"]:
        """The diagonal."""
        return self.average.value

    @property
    def _null(self) -> Bool[Tensor, " P_b"]:
        values = self.values
        return values <= rank_tolerance(values, self.rtol, 1, values.dtype)

    def _inverse(self, damping: float) -> Float[Tensor, " P_b"]:
        values = self.values
        return 1 / (values + damping) if damping else inverse_values(values, 0.0, self._null)

    def matvec(self, x: Float[Tensor, "K P_b"]) -> Float[Tensor, "K P_b"]:  # noqa: D102
        return x * self.values

    def solve(  # noqa: D102
        self, x: Float[Tensor, "K P_b"], damping: float
    ) -> tuple[Float[Tensor, "K P_b"], Float[Tensor, " K"]]:
        outside = x.new_zeros(len(x)) if damping else (x.square() * self._null).sum(-1)
        return x * self._inverse(damping), outside

    def transform(self, x: Float[Tensor, "K P_b"], power: Power) -> Float[Tensor, "K P_b"]:  # noqa: D102
        return x * power.of(self.values, self._null, self.name)

    def lift(  # noqa: D102
        self, c: Float[Tensor, "K R"], layers: tuple[LayerRows, ...], damping: float
    ) -> Float[Tensor, "K P_b"]:
        return self._entries(layers[0].rmatvec(c)) * self._inverse(damping)

    def sandwich(  # noqa: D102
        self,
        left: tuple[LayerRows, ...],
        right: tuple[LayerRows, ...],
        damping: float,
        relation: RowRelation,  # noqa: ARG002
    ) -> Float[Tensor, "Q R"]:
        weights = self._inverse(damping)
        if self.index is not None:
            weights = weights.new_zeros(self.parts[0].size).index_copy_(0, self.index, weights)
        return weighted_product(left[0], weights, right[0])

    def to_dense(self) -> Float[Tensor, "P_b P_b"]:  # noqa: D102
        return self.values.diag()

    def eigenvalues(self) -> Float[Tensor, " k"]:  # noqa: D102
        return torch.where(self._null, 0, self.values)

    def largest_eigenvalue(self) -> float:  # noqa: D102
        return float(self.values.max())

    def trace(self) -> float:  # noqa: D102
        return float(self.values.sum())

    def state(self) -> BlockState:  # noqa: D102
        return self.average.state()

    def restore(self, state: BlockState) -> None:  # noqa: D102
        self.average.restore(state)


class Diagonal(Structure, key="diagonal", summary="the diagonal of F", look=Look("#CC79A7", "X", "diagonal")):
    """The diagonal of `F`.

    Args:
        rtol: entries up to `rtol` times a layer's largest count as zero in undamped solves; ε if None.
    """

    averages = True
    by_layer = True
    adds = True

    def __init__(self, *, rtol: float | None = None) -> None:
        super().__init__()
        check_rtol(rtol)
        self._rtol = rtol

    @property
    def options(self) -> Mapping[str, object]:
        """The configuration."""
        return {"rtol": self._rtol}

    def _make_blocks(self, rows: Rows) -> list[Block]:
        return [DiagonalBlock(layer.name, layer.layout, self._rtol) for layer in rows.layers]
