"""The diagonal of the Fisher matrix."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from curvlab.fisher.block import Batch, Block, RunningAverage, times
from curvlab.fisher.structure import Structure
from curvlab.fisher.system import inverse_values, rank_tolerance
from curvlab.fisher.unit_rows import contract_units, is_plain, plain_factors
from curvlab.rows import Rows
from curvlab.rows.layer import LayerRows
from curvlab.rows.loss import OutputFactor
from curvlab.rows.parameters import Layout
from curvlab.rows.products import chunks


class DiagonalBlock(Block):
    """The diagonal of one layer's block."""

    def __init__(self, name: str, parts: Sequence[Layout], rtol: float | None) -> None:
        super().__init__(name, parts)
        self.rtol = rtol
        self.average = RunningAverage()

    def update(self, batch: Batch) -> None:  # noqa: D102
        diagonal = torch.cat([layer.diagonal() for layer in batch.layers])
        self.average.update(diagonal, batch.terms, batch.decay, additive=batch.additive)

    @property
    def _null(self) -> Float[Tensor, " P_b"]:
        values = self.average.value
        return values <= rank_tolerance(values, self.rtol, len(values))

    def _inverse(self, damping: float) -> Float[Tensor, " P_b"]:
        return inverse_values(self.average.value, damping, self._null)

    def matvec(self, x: Float[Tensor, "K P_b"]) -> Float[Tensor, "K P_b"]:  # noqa: D102
        return x * self.average.value

    def solve(  # noqa: D102
        self, x: Float[Tensor, "K P_b"], damping: float
    ) -> tuple[Float[Tensor, "K P_b"], Float[Tensor, " K"]]:
        outside = (x.square() * self._null).sum(-1) if damping == 0 else x.new_zeros(len(x))
        return x * self._inverse(damping), outside

    def lift(  # noqa: D102
        self, c: Float[Tensor, "K R"], layers: tuple[LayerRows, ...], damping: float
    ) -> Float[Tensor, "K P_b"]:
        return torch.cat([layer.rmatvec(c) for layer in layers], dim=-1) * self._inverse(damping)

    def sandwich(  # noqa: D102
        self,
        left: tuple[LayerRows, ...],
        right: tuple[LayerRows, ...],
        damping: float,
        coefficients: OutputFactor | None,  # noqa: ARG002
    ) -> Float[Tensor, "Q R"]:
        inverse = self._inverse(damping)
        if len(left) == 1 and is_plain(left[0]) and is_plain(right[0]):
            (a, _), (b, _) = plain_factors(left[0]), plain_factors(right[0])
            Q, _, I = a.shape  # noqa: E741
            scale = inverse.view(Q, -1, 1, I)
            kernels = [
                (a[:, None] * scale[:, part]) @ b[:, None].mT for part in chunks(scale.shape[1], Q * a.shape[1] * I)
            ]
            return contract_units(left[0], torch.cat(kernels, dim=1).flatten(0, 1), right[0])
        solved = torch.cat([layer.dense() for layer in right], dim=-1) * inverse
        return times(left, solved).T

    def to_dense(self) -> Float[Tensor, "P_b P_b"]:  # noqa: D102
        return self.average.value.diag()

    def eigenvalues(self) -> Float[Tensor, " k"]:  # noqa: D102
        return self.average.value

    def trace(self) -> float:  # noqa: D102
        return float(self.average.value.sum())

    def state(self) -> dict[str, Tensor | float | None]:  # noqa: D102
        return {"total": self.average.total, "weight": self.average.weight}

    def restore(self, state: dict[str, Tensor | float | None]) -> None:  # noqa: D102
        total, weight = state["total"], state["weight"]
        assert isinstance(total, Tensor) and isinstance(weight, float)
        self.average.total, self.average.weight = total, weight


class Diagonal(Structure, key="diagonal", summary="the diagonal of F"):
    """The diagonal of `F`.

    Args:
        rtol: entries up to `rtol·max` count as zero in undamped solves; n·ε if None.
    """

    def __init__(self, *, rtol: float | None = None) -> None:
        super().__init__()
        self._rtol = rtol

    @property
    def options(self) -> Mapping[str, object]:
        """The configuration."""
        return {"rtol": self._rtol}

    def _make_blocks(self, rows: Rows) -> list[Block]:
        return [DiagonalBlock(layer.name, [layer.layout], self._rtol) for layer in rows.layers]
