"""Blocks that are diagonal in a Kronecker basis.

A layer's matrix `X [units, width]` (one a group q) is rotated to `Y = Uᵀ X V`, U the eigenvectors of the factor over
units, V those of the factor over the width. There the block is diagonal with *entries* `[Q, r, s]`: `β_i α_j` for
K-FAC, the Fisher's own diagonal for EKFAC. Outside the span of the basis the block is zero. The rows of the state lie
in that span, except with *reduce* and *gradient*, whose factors know sums only; EKFAC takes a complete basis then.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, replace
from typing import Literal, TypeVar, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from curvlab.errors import StateError, unknown_name
from curvlab.fisher.block import Batch, Block, BlockState, RowRelation, check_rtol
from curvlab.fisher.inverse import DiagonalInverse, Inverse, restored
from curvlab.fisher.moment import DiagonalMoment, Factor, Moment, inverses
from curvlab.fisher.on_vectors import is_on_vectors, weighted_product
from curvlab.fisher.power import Power
from curvlab.fisher.system import inverse_values
from curvlab.rows.factored import EmbeddingRows, KroneckerRows
from curvlab.rows.layer import LayerRows, SharedRows
from curvlab.rows.parameters import Layout
from curvlab.rows.rows import gram
from curvlab.rows.side_by_side import times

Sharing = Literal["expand", "reduce", "gradient"]

Factored = TypeVar("Factored", bound=SharedRows)


@dataclass(frozen=True)
class KroneckerOptions:
    """How layers are factored, and what becomes of those that are not.

    Attributes:
        sharing: "expand", "reduce" or "gradient", for weights that are shared over positions.
        factored_damping: whether damping is split over the factors, and if so whether equally.
        max_block: largest exact block of a layer without Kronecker factors.
        max_factor: largest side of a factor that is a matrix; a longer one is diagonal.
        rtol: rank tolerance of undamped solves; round-off if None.
        invert_every: updates after which the inverses of damped factors are made anew.
    """

    sharing: Sharing = "expand"
    factored_damping: bool | Literal["equal"] = False
    max_block: int = 1024
    max_factor: int = 8192
    rtol: float | None = None
    invert_every: int = 1

    def __post_init__(self) -> None:
        if self.sharing not in get_args(Sharing):
            raise unknown_name("sharing", self.sharing, get_args(Sharing))
        if self.max_block < 0:
            raise ValueError(f"max_block is a number of parameters, got {self.max_block}.")
        if self.max_factor < 1:
            raise ValueError(f"max_factor is a number of rows ≥ 1, got {self.max_factor}.")
        check_rtol(self.rtol)
        if self.invert_every < 1:
            raise ValueError(f"invert_every is a number of updates ≥ 1, got {self.invert_every}.")
        if self.invert_every > 1 and not self.factored_damping:
            raise ValueError("invert_every keeps the inverses of damped factors: it needs factored_damping=True.")


class KroneckerBlock(Block):
    """A layer's block in the basis of two factors."""

    units: Factor
    width: Factor

    def __init__(self, name: str, layout: Layout, options: KroneckerOptions) -> None:
        super().__init__(name, [layout])
        self.options = options
        self._inverses: tuple[Inverse, Inverse] | None = None
        self._inverted_at = 0.0
        self._age = 0

    def stagger(self, turn: int, turns: int) -> None:
        """Let the inverses age ahead of other blocks', so that not all are made anew at once."""
        self._age = turn * self.options.invert_every // turns

    @abstractmethod
    def update_factors(self, batch: Batch) -> None:
        """Average the two factors."""

    def _shared(self, batch: Batch) -> tuple[LayerRows, Float[Tensor, " N"]]:
        """Return the rows for B and the weights of samples in A; with "gradient", T_n for an average over positions."""
        rows = batch.layers[0]
        if self.options.sharing != "gradient":
            return rows, batch.sample_weights
        assert isinstance(rows, SharedRows)
        return rows.map_rows(lambda g: g.sum(0, keepdim=True)), rows.sizes() * (batch.sample_weights > 0)

    def _factored(self, rows: LayerRows, expected: type[Factored]) -> Factored:
        """Return rows that have the factors which this block was made for.

        Raises:
            StateError: they have not.
        """
        if not isinstance(rows, expected):
            raise StateError(
                f"Layer {self.name!r} had factored rows in the first batch and has none in this one: the first axis of its "
                "inputs is the sample's in some batches only, as in one of a single sample. Use batches of equal size "
                "(drop_last=True), or a structure without Kronecker factors, such as 'block-diagonal'."
            )
        return rows

    def spans(self, rows: LayerRows) -> bool:  # noqa: ARG002
        """Whether the basis spans these rows, if they went into its factors."""
        return True

    @abstractmethod
    def rotate(self, rows: LayerRows) -> LayerRows:
        """Return rows in the coordinates of the basis."""

    @abstractmethod
    def weigh(self, rows: LayerRows, units: Float[Tensor, "Q r"], width: Float[Tensor, "Q s"]) -> LayerRows:
        """Multiply rotated rows with `units ⊗ width`."""

    @abstractmethod
    def weigh_by_inverses(self, rows: LayerRows, units: Inverse, width: Inverse) -> LayerRows:
        """Multiply rows with the inverses of the factors."""

    @abstractmethod
    def worth_factoring(self, rows: LayerRows, *, summed: bool = False) -> bool:
        """Whether it takes fewer operations to multiply the factors of rows with inverses than their sum.

        Args:
            rows: the rows; where `summed`, only their shape but for the number of rows a sample counts.
            summed: whether the sum is at hand, of one row a sample.
        """

    def update(self, batch: Batch) -> None:  # noqa: D102
        self.update_factors(batch)
        self._age += 1
        if self._age >= self.options.invert_every:
            self._inverses, self._age = None, 0

    def entries(self) -> Float[Tensor, "Q r s"]:
        """Return the diagonal in the basis."""
        return self.units.basis.values[..., None] * self.width.basis.values[:, None, :]

    def null(self) -> Bool[Tensor, "Q r s"]:
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
        nothing = x.new_zeros(len(x))
        if self._splits(damping):
            return self._solve_factors(x, damping), nothing
        y = self.into(x)
        solution = self.back(inverse_values(self.entries(), damping, self.null()) * y)
        if damping == 0:
            return solution, (x - self.back(~self.null() * y)).square().sum(-1)
        return solution if self._complete else solution + (x - self.back(y)) / damping, nothing

    def transform(self, x: Float[Tensor, "K P_b"], power: Power) -> Float[Tensor, "K P_b"]:
        """Return `f(F) x`; damping of a matrix is split over the factors if that of solves is."""
        if self._splits(power.damping) and power.damps == "matrix":
            matrix = x.view(len(x), self.units.shape[0], -1, self.parts[0].width)
            units, width = (
                basis.shifted(rho, -power.exponent)
                for basis, rho in zip((self.units.basis, self.width.basis), self._split(power.damping), strict=True)
            )
            return units(width(matrix.mT).mT).flatten(1)
        y, outside = self.into(x), power.outside
        values = power.of(self.entries(), self.null(), self.name)
        found = self.back((values - outside) * y)
        return found + outside * x if outside else found

    def _splits(self, damping: float) -> bool:
        return bool(self.options.factored_damping) and damping > 0

    @property
    def _complete(self) -> bool:
        """Whether nothing lies outside the span of the basis."""
        return self.units.basis.complete and self.width.basis.complete

    def _split(self, damping: float) -> tuple[Float[Tensor, " Q"], Float[Tensor, " Q"]]:
        """Split ρ into `√ρ/π` for the units' factor, `√ρ·π` for the width's, π² the ratio of their mean eigenvalues."""
        units, width = self.units.mean_eigenvalue(), self.width.mean_eigenvalue()
        usable = (units > 0) & (width > 0)
        pi = torch.where(usable, (width / torch.where(usable, units, 1)).sqrt(), 1)
        if self.options.factored_damping == "equal":
            pi = torch.ones_like(pi)
        return damping**0.5 / pi, damping**0.5 * pi

    def invert_factors(self, damping: float) -> list[tuple[Factor, Float[Tensor, " Q"]]]:
        """Return the factors, and their shares of ρ, whose inverses `set_inverses` needs for a solve; none if it has them."""
        if not self._splits(damping) or (self._inverses is not None and self._inverted_at == damping):
            return []
        return list(zip((self.units, self.width), self._split(damping), strict=True))

    def set_inverses(self, damping: float, units: Inverse, width: Inverse) -> None:
        """Take the inverses of the damped factors."""
        self._inverses, self._inverted_at = (units, width), damping

    def _factor_inverses(self, damping: float) -> tuple[Inverse, Inverse]:
        if wanted := self.invert_factors(damping):
            self.set_inverses(damping, *inverses(wanted, self.options.invert_every))
        assert self._inverses is not None
        return self._inverses

    def _solve_factors(self, x: Float[Tensor, "K P_b"], damping: float) -> Float[Tensor, "K P_b"]:
        units, width = self._factor_inverses(damping)
        matrix = x.view(len(x), self.units.shape[0], -1, self.parts[0].width)
        return units.times_columns(width.times_rows(matrix)).flatten(1)

    def _inverse_within(self, damping: float) -> Float[Tensor, "Q r s"]:
        """Return the inverse entries for vectors in the span of the basis."""
        if not self._splits(damping):
            return inverse_values(self.entries(), damping, self.null())
        rho_units, rho_width = self._split(damping)
        units = self.units.basis.values + rho_units[:, None]
        return 1 / (units[..., None] * (self.width.basis.values + rho_width[:, None])[:, None, :])

    def prefers_per_sample_gradients(self, layers: tuple[LayerRows, ...], damping: float) -> bool:  # noqa: D102
        return self._splits(damping) and self.worth_factoring(layers[0], summed=True)

    def solve_sum(self, layers: tuple[LayerRows, ...], damping: float) -> dict[str, Tensor]:  # noqa: D102
        return self.weigh_by_inverses(layers[0], *self._factor_inverses(damping)).total_by_parameter()

    def lift(  # noqa: D102
        self, c: Float[Tensor, "K R"], layers: tuple[LayerRows, ...], damping: float
    ) -> Float[Tensor, "K P_b"]:
        rows = layers[0]
        if self._splits(damping):
            if not self.worth_factoring(rows):
                return self._solve_factors(rows.rmatvec(c), damping)
            return self.weigh_by_inverses(rows, *self._factor_inverses(damping)).rmatvec(c)
        if damping > 0 and not (self._complete or self.spans(rows)):
            return self.solve(rows.rmatvec(c), damping)[0]
        inverse = self._inverse_within(damping)
        return self.back(self.rotate(rows).rmatvec(c).view(len(c), *inverse.shape) * inverse)

    def sandwich(  # noqa: D102
        self,
        left: tuple[LayerRows, ...],
        right: tuple[LayerRows, ...],
        damping: float,
        relation: RowRelation,
    ) -> Float[Tensor, "Q R"]:
        x, y = self.rotate(left[0]), self.rotate(right[0])
        spanned = damping == 0 or self._complete or (relation.coefficients is not None and self.spans(right[0]))
        if not spanned and self._splits(damping):
            return times(left, self._solve_factors(right[0].dense(), damping)).T
        within = self._contract(x, y, damping)
        return within if spanned else within + (gram(left, right) - gram([x], [y])) / damping

    def _contract(self, x: LayerRows, y: LayerRows, damping: float) -> Float[Tensor, "Q R"]:
        return weighted_product(x, self._inverse_within(damping).flatten(), y)

    def to_dense(self) -> Float[Tensor, "P_b P_b"]:  # noqa: D102
        entries = self.entries()
        return self.matvec(torch.eye(self.size, dtype=entries.dtype, device=entries.device))

    def eigenvalues(self) -> Float[Tensor, " k"]:  # noqa: D102
        return torch.where(self.null(), 0, self.entries()).flatten()

    def trace(self) -> float:  # noqa: D102
        return float(self.entries().sum())

    def state(self) -> BlockState:  # noqa: D102
        named = {"units": self.units, "width": self.width}
        state = {f"{name}.{key}": value for name, factor in named.items() for key, value in factor.state().items()}
        for name, inverse in zip(named, self._inverses or (), strict=False):
            state |= {f"inverses.{name}.{key}": value for key, value in inverse.state().items()}
        return state | {"inverted_at": self._inverted_at, "age": float(self._age)}

    def restore(self, state: BlockState) -> None:  # noqa: D102
        def part(prefix: str) -> BlockState:
            return {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}

        self.units.restore(part("units."))
        self.width.restore(part("width."))
        units, width = part("inverses.units."), part("inverses.width.")
        self._inverses = (restored(units), restored(width)) if units else None
        damping, age = state["inverted_at"], state["age"]
        assert isinstance(damping, float)
        assert isinstance(age, float)
        self._inverted_at, self._age = damping, int(age)


class KFACBlock(KroneckerBlock):
    """`B ⊗ A`: entries are products, so an undamped inverse stays factored."""

    def condition_number(self) -> float:
        """Return the larger condition number of the two factors, which are inverted one at a time."""
        bases = (self.units.basis, self.width.basis)
        kept = [basis.values[~basis.null] for basis in bases]
        return max([1.0, *(float(values.max() / values.min()) for values in kept if len(values))])

    def _contract(self, x: LayerRows, y: LayerRows, damping: float) -> Float[Tensor, "Q R"]:
        if damping > 0:
            return super()._contract(x, y, damping)
        units = inverse_values(self.units.basis.values, 0.0, self.units.basis.null)
        width = inverse_values(self.width.basis.values, 0.0, self.width.basis.null)
        return gram([x], [self.weigh(y, units, width)])


class LinearBlock(KroneckerBlock):
    """Factors of a layer whose rows are `Σ_t g ⊗ a`: B over units, A over the width, one pair a group.

    Args:
        name: of the layer.
        layout: of its parameters.
        options: how layers are factored.
        sides: rows of B and of A.
    """

    def __init__(self, name: str, layout: Layout, options: KroneckerOptions, sides: tuple[int, int]) -> None:
        super().__init__(name, layout, options)
        self.units, self.width = (self._factor(side) for side in sides)

    def _factor(self, side: int) -> Moment | DiagonalMoment:
        if side > self.options.max_factor:
            return DiagonalMoment(self.options.rtol)
        return Moment(self.options.rtol, complete=self._leaves_span)

    @property
    def diagonal_sides(self) -> list[str]:
        """The factors that are diagonal, as they are too large."""
        return [side for side, factor in (("B", self.units), ("A", self.width)) if isinstance(factor, DiagonalMoment)]

    def elements(self, batch: Batch) -> int:  # noqa: D102
        rows = self._factored(batch.layers[0], KroneckerRows)
        (*_, Q, O), I = rows.g.shape, rows.a.shape[3]  # noqa: E741
        return Q * sum(side if side > self.options.max_factor else side**2 for side in (O, I))

    @property
    def _leaves_span(self) -> bool:
        """Whether the block is not zero outside the range of the factors."""
        return False

    @property
    def _reduce(self) -> bool:
        return self.options.sharing == "reduce"

    def update_factors(self, batch: Batch) -> None:  # noqa: D102
        rows, weights = self._shared(batch)
        assert isinstance(rows, KroneckerRows)
        inputs, scale = rows.input_root(weights, reduce=self._reduce)
        outputs = rows.output_root(reduce=self._reduce)
        weight = float(batch.sample_weights.sum())
        _add(self.width, inputs, weight, scale, batch, additive=False)
        _add(self.units, outputs, batch.weight, batch.weight, batch, additive=batch.additive)

    def spans(self, rows: LayerRows) -> bool:  # noqa: D102
        return self.options.sharing == "expand" or (self._reduce and is_on_vectors(rows))

    def rotate(self, rows: LayerRows) -> KroneckerRows:  # noqa: D102
        assert isinstance(rows, KroneckerRows)
        u, v = self.units.basis, self.width.basis
        (Q, r), s = u.values.shape, v.values.shape[1]
        layout = Layout.of(Q * r, {rows.name: torch.Size((Q, r, s))})
        inputs = rows.a if v.vectors is None else torch.einsum("ntqi,qij->ntqj", rows.a, v.vectors)
        outputs = rows.g if u.vectors is None else torch.einsum("vntqo,qop->vntqp", rows.g, u.vectors)
        return KroneckerRows(rows.name, layout, inputs, outputs, rows.lengths)

    def weigh(  # noqa: D102
        self, rows: LayerRows, units: Float[Tensor, "Q r"], width: Float[Tensor, "Q s"]
    ) -> KroneckerRows:
        assert isinstance(rows, KroneckerRows)
        return replace(rows, a=rows.a * width, g=rows.g * units)

    def weigh_by_inverses(self, rows: LayerRows, units: Inverse, width: Inverse) -> KroneckerRows:  # noqa: D102
        assert isinstance(rows, KroneckerRows)
        return replace(rows, a=_per_group(rows.a, width), g=_per_group(rows.g, units))

    def worth_factoring(self, rows: LayerRows, *, summed: bool = False) -> bool:  # noqa: D102
        assert isinstance(rows, KroneckerRows)
        (V, N, T, _, O), I = rows.g.shape, rows.a.shape[3]  # noqa: E741
        adding = N * T * O * I if summed else 0
        return N * T * ((1 if summed else V) * O**2 + I**2) + adding < O * I * (O + I)


def _add(
    factor: Factor, root: Float[Tensor, "Q m t d"], weight: float, scale: float, batch: Batch, *, additive: bool
) -> None:
    """Add `scale·Σ x xᵀ` over x in the root to a factor, or its diagonal where that is all it keeps."""
    if isinstance(factor, DiagonalMoment):
        diagonal = scale * torch.einsum("qmtd,qmtd->qd", root, root)
        factor.update(diagonal, weight, batch.decay, additive=additive, total=batch.total)
    else:
        assert isinstance(factor, Moment)
        factor.update(root, weight, batch.decay, scale=scale, additive=additive, total=batch.total)


def _per_group(x: Float[Tensor, "*K T Q d"], inverse: Inverse) -> Float[Tensor, "*K T Q d"]:
    """Multiply the rows of every group with its inverse."""
    return inverse.times_rows(x.transpose(-3, -2)).transpose(-3, -2)


class EmbeddingBlock(KroneckerBlock):
    """Factors of an embedding: A, diagonal over the table's rows, and B over their entries."""

    def __init__(self, name: str, layout: Layout, options: KroneckerOptions) -> None:
        super().__init__(name, layout, options)
        self.units: DiagonalMoment = DiagonalMoment()
        self.width: Moment = Moment(options.rtol)

    def elements(self, batch: Batch) -> int:  # noqa: D102
        self._factored(batch.layers[0], EmbeddingRows)
        return self.parts[0].units + self.parts[0].width ** 2

    def update_factors(self, batch: Batch) -> None:  # noqa: D102
        rows, weights = self._shared(batch)
        assert isinstance(rows, EmbeddingRows)
        outputs, weight = rows.output_root()[None], float(batch.sample_weights.sum())
        self.units.update(rows.frequency(weights)[None], weight, batch.decay, total=batch.total)
        self.width.update(
            outputs, batch.weight, batch.decay, scale=batch.weight, additive=batch.additive, total=batch.total
        )

    def rotate(self, rows: LayerRows) -> EmbeddingRows:  # noqa: D102
        assert isinstance(rows, EmbeddingRows)
        v = self.width.basis.vectors
        assert v is not None
        layout = Layout.of(rows.layout.units, {rows.name: torch.Size((rows.layout.units, v.shape[2]))})
        return EmbeddingRows(rows.name, layout, rows.index, rows.g @ v[0], rows.lengths)

    def weigh(  # noqa: D102
        self, rows: LayerRows, units: Float[Tensor, "Q r"], width: Float[Tensor, "Q s"]
    ) -> EmbeddingRows:
        assert isinstance(rows, EmbeddingRows)
        return replace(rows, g=rows.g * width[0] * units[0, rows.index][..., None])

    def weigh_by_inverses(self, rows: LayerRows, units: Inverse, width: Inverse) -> EmbeddingRows:  # noqa: D102
        assert isinstance(rows, EmbeddingRows)
        assert isinstance(units, DiagonalInverse)
        weights = units.diagonal[0, rows.index][..., None]
        return replace(rows, g=width.times_rows(rows.g[..., None, :, :])[..., 0, :, :] * weights)

    def worth_factoring(self, rows: LayerRows, *, summed: bool = False) -> bool:  # noqa: D102
        assert isinstance(rows, EmbeddingRows)
        return rows.g.shape[summed:3].numel() < rows.layout.units
