"""Blocks that are diagonal in a Kronecker basis.

A layer's matrix `X [units, width]` (one a group q) is rotated to `Y = Uᵀ X V`, U the eigenvectors of the factor over
units, V those of the factor over the width. There the block is diagonal with *entries* `[Q, r, s]`: `β_i α_j` for
K-FAC, the Fisher's own diagonal for EKFAC. Outside the span of the basis the block is zero. The rows of the state lie
in that span, except with *reduce* and *gradient*, whose factors know sums only; EKFAC takes a complete basis then.
"""

from __future__ import annotations

from abc import abstractmethod
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from curvlab.errors import StateError, unknown_name
from curvlab.fisher.block import Batch, Block, BlockState, RowRelation, Total, check_rtol
from curvlab.fisher.inverse import Inverse, restored
from curvlab.fisher.lasting import LastingBlock
from curvlab.fisher.moment import Factor, Invert, inverses
from curvlab.fisher.on_vectors import weighted_product
from curvlab.fisher.power import Power
from curvlab.fisher.system import inverse_values
from curvlab.rows.layer import LayerRows, SharedRows
from curvlab.rows.parameters import Layout
from curvlab.rows.rows import gram
from curvlab.rows.side_by_side import times

Sharing = Literal["expand", "reduce", "gradient"]

Factored = TypeVar("Factored", bound=LayerRows)


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
        output_groups: number of equal groups of consecutive outputs of which B is block-diagonal.
    """

    sharing: Sharing = "expand"
    factored_damping: bool | Literal["equal"] = False
    max_block: int = 1024
    max_factor: int = 8192
    rtol: float | None = None
    invert_every: int = 1
    output_groups: int = 1

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
        if self.output_groups < 1:
            raise ValueError(f"output_groups is a number of groups ≥ 1, got {self.output_groups}.")
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
        present = (batch.sample_weights > 0).to(rows.dtype)
        return rows.map_rows(lambda g: g.sum(0, keepdim=True)), torch.einsum("n...,n->n...", rows.sizes(), present)

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
    def weigh(self, rows: LayerRows, units: Float[Tensor, "Q r"], width: Float[Tensor, "S s"]) -> LayerRows:
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
        self._age += not batch.further
        if self._age >= self.options.invert_every:
            self._inverses, self._age = None, 0

    def add_up(self, total: Total) -> None:
        """Add up the factors."""
        self.units.add_up(total)
        self.width.add_up(total)

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

    def _split(self, damping: float) -> tuple[Float[Tensor, " Q"], Float[Tensor, " S"]]:
        """Split ρ into `√ρ/π` for the units' factor, `√ρ·π` for the width's, π² the ratio of their mean eigenvalues.

        Where units are in more groups than the width, they share ρ.
        """
        units, width = self.units.mean_eigenvalue(), self.width.mean_eigenvalue()
        groups = len(units)
        if groups > len(width):
            units = units.mean(0, keepdim=True)
        usable = (units > 0) & (width > 0)
        # Roots first: the ratio of a loss that has all but vanished overflows in single precision.
        pi = torch.where(usable, width.sqrt() / torch.where(usable, units, 1).sqrt(), 1)
        if self.options.factored_damping == "equal":
            pi = torch.ones_like(pi)
        return (damping**0.5 / pi).expand(groups), damping**0.5 * pi

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
        shape = (len(x), -1, self.parts[0].width)
        by_width = width.times_rows(x.view(shape).unflatten(1, (self.width.shape[0], -1)))
        return units.times_columns(by_width.reshape(shape).unflatten(1, (self.units.shape[0], -1))).flatten(1)

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


def stagger(blocks: Sequence[Block]) -> None:
    """Let layers take turns in making inverses anew, those with factors and those with exact blocks among themselves."""
    for kind in (KroneckerBlock, LastingBlock):
        alike = [block for block in blocks if isinstance(block, kind)]
        for turn, block in enumerate(alike):
            block.stagger(turn, len(alike))


def share_inverses(blocks: Iterable[Block], damping: float, invert: Invert) -> None:
    """Make the inverses of damped factors that are due, those of blocks that keep them equally long together."""
    due: dict[int, dict[KroneckerBlock, list[tuple[Factor, Tensor]]]] = defaultdict(dict)
    for block in blocks:
        if isinstance(block, KroneckerBlock) and (wanted := block.invert_factors(damping)):
            due[block.options.invert_every][block] = wanted
    for uses, of_block in due.items():
        found = invert([pair for wanted in of_block.values() for pair in wanted], uses)
        for block, units, width in zip(of_block, found[::2], found[1::2], strict=True):
            block.set_inverses(damping, units, width)
