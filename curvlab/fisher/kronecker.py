"""Blocks that are diagonal in a Kronecker basis.

A layer's matrix `X [units, width]` (one a group q) is rotated to `Y = Uᵀ X V`, U the eigenvectors of the factor over units,
V those of the factor over the width. There the block is diagonal with *entries* `[Q, r, s]`: `β_i α_j` for K-FAC, the
Fisher's own diagonal for EKFAC. Outside the span of the basis the block is zero.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import replace
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from curvlab.fisher.block import Batch, Block, times
from curvlab.fisher.moment import DiagonalMoment, Factor, Moment, State
from curvlab.fisher.system import inverse_values
from curvlab.rows.layer import EmbeddingRows, KroneckerRows, LayerRows
from curvlab.rows.loss import OutputFactor
from curvlab.rows.parameters import Layout
from curvlab.rows.rows import gram

Sharing = Literal["expand", "reduce"]


class KroneckerBlock(Block):
    """A layer's block in the basis of two factors.

    Args:
        name: the layer's name.
        layout: its parameters.
        factored_damping: whether damping is split over the factors.
    """

    units: Factor
    width: Factor

    def __init__(self, name: str, layout: Layout, factored_damping: bool) -> None:
        super().__init__(name, [layout])
        self.factored_damping = factored_damping

    @abstractmethod
    def update_factors(self, batch: Batch) -> None:
        """Average the two factors."""

    @abstractmethod
    def rotate(self, rows: LayerRows) -> LayerRows:
        """Return rows in the coordinates of the basis."""

    @abstractmethod
    def weigh(self, rows: LayerRows, units: Float[Tensor, "Q r"], width: Float[Tensor, "Q s"]) -> LayerRows:
        """Multiply rotated rows with `units ⊗ width`."""

    def update(self, batch: Batch) -> None:  # noqa: D102
        self.update_factors(batch)

    def entries(self) -> Float[Tensor, "Q r s"]:
        """Return the diagonal in the basis."""
        return self.units.basis.values[..., None] * self.width.basis.values[:, None, :]

    def null(self) -> Float[Tensor, "Q r s"]:
        """Return which entries count as null: those of null directions of a factor."""
        return self.units.basis.null[..., None] | self.width.basis.null[:, None, :]

    def into(self, x: Float[Tensor, "K P_b"]) -> Float[Tensor, "K Q r s"]:
        """Return the coordinates of vectors."""
        layout = self.parts[0]
        matrix = x.view(len(x), self.units.basis.values.shape[0], -1, layout.width)
        return self.width.basis.into(self.units.basis.into(matrix).mT).mT

    def back(self, y: Float[Tensor, "K Q r s"]) -> Float[Tensor, "K P_b"]:
        """Return the vectors with given coordinates."""
        return self.units.basis.back(self.width.basis.back(y.mT).mT).flatten(1)

    def matvec(self, x: Float[Tensor, "K P_b"]) -> Float[Tensor, "K P_b"]:  # noqa: D102
        return self.back(self.entries() * self.into(x))

    def solve(  # noqa: D102
        self, x: Float[Tensor, "K P_b"], damping: float
    ) -> tuple[Float[Tensor, "K P_b"], Float[Tensor, " K"]]:
        if self.factored_damping and damping > 0:
            return self._solve_factors(x, damping), x.new_zeros(len(x))
        y = self.into(x)
        inverse = inverse_values(self.entries(), damping, self.null())
        if damping > 0:
            return self.back((inverse - 1 / damping) * y) + x / damping, x.new_zeros(len(x))
        inside = (y.square() * ~self.null()).sum((1, 2, 3))
        return self.back(inverse * y), (x.square().sum(-1) - inside).clamp_min(0)

    def _split(self, damping: float) -> tuple[Float[Tensor, " Q"], Float[Tensor, " Q"]]:
        """Split ρ into `√ρ/π` for the units' factor and `√ρ·π` for the width's, π² the ratio of their mean eigenvalues."""
        units, width = self.units.mean_eigenvalue(), self.width.mean_eigenvalue()
        usable = (units > 0) & (width > 0)
        pi = torch.where(usable, (width / torch.where(usable, units, 1)).sqrt(), 1)
        return damping**0.5 / pi, damping**0.5 * pi

    def _solve_factors(self, x: Float[Tensor, "K P_b"], damping: float) -> Float[Tensor, "K P_b"]:
        matrix = x.view(len(x), self.units.basis.values.shape[0], -1, self.parts[0].width)
        rho_units, rho_width = self._split(damping)
        matrix = _solve_factor(self.units, matrix, rho_units)
        return _solve_factor(self.width, matrix.mT, rho_width).mT.flatten(1)

    def _inverse_within(self, damping: float) -> Float[Tensor, "Q r s"]:
        """Return the inverse entries for vectors in the span of the basis."""
        if not (self.factored_damping and damping > 0):
            return inverse_values(self.entries(), damping, self.null())
        rho_units, rho_width = self._split(damping)
        units = self.units.basis.values + rho_units[:, None]
        return 1 / (units[..., None] * (self.width.basis.values + rho_width[:, None])[:, None, :])

    def lift(  # noqa: D102
        self, c: Float[Tensor, "K R"], layers: tuple[LayerRows, ...], damping: float
    ) -> Float[Tensor, "K P_b"]:
        inverse = self._inverse_within(damping)
        y = self.rotate(layers[0]).rmatvec(c).view(len(c), *inverse.shape)
        return self.back(y * inverse)

    def sandwich(  # noqa: D102
        self,
        left: tuple[LayerRows, ...],
        right: tuple[LayerRows, ...],
        damping: float,
        coefficients: OutputFactor | None,
    ) -> Float[Tensor, "Q R"]:
        if coefficients is None and self.factored_damping and damping > 0:
            return times(left, self._solve_factors(right[0].dense(), damping)).T
        x, y = self.rotate(left[0]), self.rotate(right[0])
        within = self._contract(x, y, damping)
        if coefficients is None and damping > 0:
            return within + (gram(left, right) - gram([x], [y])) / damping
        return within

    def _contract(self, x: LayerRows, y: LayerRows, damping: float) -> Float[Tensor, "Q R"]:
        return x.dense() @ (y.dense() * self._inverse_within(damping).flatten()).T

    def to_dense(self) -> Float[Tensor, "P_b P_b"]:  # noqa: D102
        entries = self.entries()
        return self.matvec(torch.eye(self.size, dtype=entries.dtype, device=entries.device))

    def eigenvalues(self) -> Float[Tensor, " k"]:  # noqa: D102
        return self.entries().flatten()

    def trace(self) -> float:  # noqa: D102
        return float(self.entries().sum())

    def state(self) -> State:  # noqa: D102
        named = {"units": self.units, "width": self.width}
        return {f"{name}.{key}": value for name, factor in named.items() for key, value in factor.state().items()}

    def restore(self, state: State) -> None:  # noqa: D102
        for name, factor in (("units", self.units), ("width", self.width)):
            prefix = f"{name}."
            factor.restore({k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)})


def _solve_factor(
    factor: Factor, x: Float[Tensor, "K Q d m"], damping: Float[Tensor, " Q"]
) -> Float[Tensor, "K Q d m"]:
    """Return `(M + ρI)⁻¹x` of every group."""
    basis, rho = factor.basis, damping[:, None, None]
    values = basis.values[..., None]
    return (x - basis.back(basis.into(x) * (values / (values + rho)))) / rho


class KFACBlock(KroneckerBlock):
    """`B ⊗ A`: entries are products, so an undamped inverse stays factored."""

    def _contract(self, x: LayerRows, y: LayerRows, damping: float) -> Float[Tensor, "Q R"]:
        if damping > 0:
            return super()._contract(x, y, damping)
        units = inverse_values(self.units.basis.values, 0.0, self.units.basis.null)
        width = inverse_values(self.width.basis.values, 0.0, self.width.basis.null)
        return gram([x], [self.weigh(y, units, width)])


class LinearBlock(KroneckerBlock):
    """Factors of a layer whose rows are `Σ_t g ⊗ a`: B over units, A over the width, one pair a group.

    Args:
        name: the layer's name.
        layout: its parameters.
        factored_damping: whether damping is split over the factors.
        sharing: "expand" or "reduce", for weights shared over positions.
        rtol: rank tolerance of the factors.
    """

    def __init__(
        self, name: str, layout: Layout, factored_damping: bool, sharing: Sharing, rtol: float | None
    ) -> None:
        super().__init__(name, layout, factored_damping)
        self.sharing = sharing
        self.units: Moment = Moment(rtol)
        self.width: Moment = Moment(rtol)

    def update_factors(self, batch: Batch) -> None:  # noqa: D102
        rows = batch.layers[0]
        assert isinstance(rows, KroneckerRows)
        reduce = self.sharing == "reduce"
        weight = float(batch.sample_weights.sum())
        root = rows.input_root(batch.sample_weights, reduce=reduce) / max(weight, 1e-300) ** 0.5
        self.width.update(root, weight, batch.decay)
        self.units.update(rows.output_root(reduce=reduce), batch.terms, batch.decay, additive=batch.additive)

    def rotate(self, rows: LayerRows) -> KroneckerRows:  # noqa: D102
        assert isinstance(rows, KroneckerRows)
        u, v = self.units.basis.vectors, self.width.basis.vectors
        assert u is not None and v is not None
        Q, _, r = u.shape
        layout = Layout.of(Q * r, {rows.name: torch.Size((Q, r, v.shape[2]))})
        inputs = torch.einsum("ntqi,qij->ntqj", rows.a, v)
        outputs = torch.einsum("vntqo,qop->vntqp", rows.g, u)
        return KroneckerRows(rows.name, layout, inputs, outputs)

    def weigh(  # noqa: D102
        self, rows: LayerRows, units: Float[Tensor, "Q r"], width: Float[Tensor, "Q s"]
    ) -> KroneckerRows:
        assert isinstance(rows, KroneckerRows)
        return replace(rows, a=rows.a * width, g=rows.g * units)


class EmbeddingBlock(KroneckerBlock):
    """Factors of an embedding: A, diagonal over the table's rows, and B over their entries."""

    def __init__(self, name: str, layout: Layout, factored_damping: bool, rtol: float | None) -> None:
        super().__init__(name, layout, factored_damping)
        self.units: DiagonalMoment = DiagonalMoment()
        self.width: Moment = Moment(rtol)

    def update_factors(self, batch: Batch) -> None:  # noqa: D102
        rows = batch.layers[0]
        assert isinstance(rows, EmbeddingRows)
        weight = float(batch.sample_weights.sum())
        self.units.update(rows.frequency(batch.sample_weights) / max(weight, 1e-300), weight, batch.decay)
        self.width.update(rows.output_root()[None], batch.terms, batch.decay, additive=batch.additive)

    def rotate(self, rows: LayerRows) -> EmbeddingRows:  # noqa: D102
        assert isinstance(rows, EmbeddingRows)
        v = self.width.basis.vectors
        assert v is not None
        layout = Layout.of(rows.layout.units, {rows.name: torch.Size((rows.layout.units, v.shape[2]))})
        return EmbeddingRows(rows.name, layout, rows.index, rows.g @ v[0])

    def weigh(  # noqa: D102
        self, rows: LayerRows, units: Float[Tensor, "Q r"], width: Float[Tensor, "Q s"]
    ) -> EmbeddingRows:
        assert isinstance(rows, EmbeddingRows)
        return replace(rows, g=rows.g * width[0] * units[0, rows.index][..., None])
