"""The inverse of a running average of Fisher matrices, by recursion, as in adaptive natural gradient.

    G ← κ G + β SᵀS                                                      κ = 1 − e, β = e at a rate e
    woodbury      G⁻¹ ← (G⁻¹ − G⁻¹Sᵀ ((κ/β) I + S G⁻¹Sᵀ)⁻¹ S G⁻¹) / κ      the inverse of that
    first order   G⁻¹ ← (2 − κ) G⁻¹ − β G⁻¹SᵀS G⁻¹                       its first order in e

G is never formed. It starts at a multiple of the identity, which is a part of the average.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from math import inf, isfinite, nan
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from curvlab.errors import NotPositiveDefinite, unknown_name
from curvlab.fisher.block import Batch, Block, BlockState, RowRelation
from curvlab.fisher.full import as_partition, partition_parts
from curvlab.fisher.power import Power
from curvlab.fisher.structure import Structure
from curvlab.fisher.system import Eigen, System
from curvlab.rows import Rows
from curvlab.rows.layer import LayerRows
from curvlab.rows.parameters import Layout
from curvlab.rows.side_by_side import combine, dense, times
from curvlab.tools.looks import Look

Recursion = Literal["woodbury", "first-order"]

LARGEST_RATE = 0.5
"""Rate above which one that falls with the number of updates is cut off: at 1, nothing of the state would be left."""


@dataclass(frozen=True)
class Adaption:
    """How an inverse follows the batches.

    Attributes:
        recursion: "woodbury" or "first-order".
        rate: e of every update, as a number or as "c/t", where t counts updates; if None, it follows from weights and decay.
        prior: weight of the identity in the average, in terms of a loss that is a mean, or in batches of one that is a sum.
        scale: what the identity is multiplied with.
    """

    recursion: Recursion = "woodbury"
    rate: float | str | None = None
    prior: float = 1.0
    scale: float = 1.0

    def __post_init__(self) -> None:
        if self.recursion not in get_args(Recursion):
            raise unknown_name("recursion", self.recursion, get_args(Recursion))
        for name in ("prior", "scale"):
            value = getattr(self, name)
            if not (isfinite(value) and value > 0):
                raise ValueError(f"{name} is a finite number > 0, got {value}.")
        if self.rate is not None:
            self.rate_at(1)

    def rate_at(self, update: int) -> float:
        """Return e of an update, counted from 1.

        Raises:
            ValueError: if there is no such rate.
        """
        rate, numerator = self.rate, nan
        if isinstance(rate, str) and rate.endswith("/t"):
            with suppress(ValueError):
                numerator = float(rate.removesuffix("/t"))
        if isfinite(numerator) and numerator > 0:
            return min(numerator / update, LARGEST_RATE)
        if isinstance(rate, float | int) and 0 < rate < 1:
            return rate
        raise ValueError(f'rate is a number in (0, 1), or a string such as "1/t", got {rate!r}.')

    def start(self, size: int, like: Tensor) -> Float[Tensor, "n n"]:
        """Return the inverse before the first batch."""
        return torch.eye(size, dtype=like.dtype, device=like.device) / self.scale


class AdaptiveBlock(Block):
    """A matrix G that is known by its inverse.

    Args:
        name: names of the layers, for messages.
        parts: see `Block`.
        adaption: how it follows the batches.
    """

    def __init__(self, name: str, parts: Sequence[Layout], adaption: Adaption) -> None:
        super().__init__(name, parts)
        self.adaption = adaption
        self._inverse: Float[Tensor, "P_b P_b"] | None = None
        self._weight = 0.0
        self._updates = 0
        self._system: System | None = None

    def elements(self, batch: Batch) -> int:  # noqa: ARG002
        """Return how many numbers the inverse has."""
        return self.size**2

    def update(self, batch: Batch) -> None:
        """Take a batch into the average.

        Raises:
            NotPositiveDefinite: if the inverse would have an eigenvalue that is not positive.
        """
        x = dense(batch.layers)
        starts = batch.decay == 0 or self._inverse is None
        before = self.adaption.start(self.size, x) if starts else self.inverse
        weight = self.adaption.prior if starts else batch.decay * self._weight
        updates = 1 if starts else self._updates + 1
        adds = batch.additive and batch.decay == 1 and not starts
        after = weight if adds else weight + batch.weight
        keep, add = weight / after, batch.weight / after
        if self.adaption.rate is not None:
            add = self.adaption.rate_at(updates)
            keep = 1 - add
        self._inverse = RECURSIONS[self.adaption.recursion](before, x, keep, add, self.name)
        self._weight, self._updates, self._system = after, updates, None

    @property
    def inverse(self) -> Float[Tensor, "P_b P_b"]:
        """G⁻¹."""
        assert self._inverse is not None
        return self._inverse

    @property
    def system(self) -> System:
        """G⁻¹, as a matrix that is solved and decomposed."""
        if self._system is None:
            self._system = System(self.inverse, f"block {self.name!r}", symmetric=True)
        return self._system

    @property
    def eigen(self) -> Eigen:
        """The eigendecomposition of G⁻¹.

        Raises:
            NotPositiveDefinite: if an eigenvalue is not positive to rounding.
        """
        eigen = self.system.eigen
        if not bool((eigen.values > 0).all()):
            raise NotPositiveDefinite(
                f"layers {self.name}: to rounding in {str(self.inverse.dtype).removeprefix('torch.')}, the inverse has an "
                f"eigenvalue ≤ 0 beside {float(eigen.values.max()):.3g}, as it grows where no batch of the average has a "
                "gradient. Use a decay nearer to 1, or float64."
            )
        return eigen

    @property
    def _values(self) -> Float[Tensor, " P_b"]:
        """Eigenvalues of G."""
        return 1 / self.eigen.values

    def _of(self, x: Float[Tensor, "K P_b"], values: Float[Tensor, " P_b"]) -> Float[Tensor, "K P_b"]:
        """Multiply with the matrix that has other eigenvalues."""
        eigen = self.eigen
        return ((eigen.coordinates(x) * values) @ eigen.vectors.mT).to(x)

    def matvec(self, x: Float[Tensor, "K P_b"]) -> Float[Tensor, "K P_b"]:
        """Return `G x`, the solution of `G⁻¹ y = x`."""
        return self._of(x, self._values)

    def solve(self, x: Float[Tensor, "K P_b"], damping: float) -> tuple[Float[Tensor, "K P_b"], Float[Tensor, " K"]]:
        """Return `(G + ρI)⁻¹x = G⁻¹(G⁻¹ + I/ρ)⁻¹x/ρ`, without damping one product."""
        return self._solved(x, damping), x.new_zeros(len(x))

    def _solved(self, x: Float[Tensor, "K P_b"], damping: float) -> Float[Tensor, "K P_b"]:
        if damping == 0:
            return x @ self.inverse
        return self.system.solve(x.mT, 1 / damping).mT @ self.inverse / damping

    def transform(self, x: Float[Tensor, "K P_b"], power: Power) -> Float[Tensor, "K P_b"]:  # noqa: D102
        values = self._values
        return self._of(x, power.of(values, torch.zeros_like(values, dtype=torch.bool), self.name))

    def lift(  # noqa: D102
        self, c: Float[Tensor, "K R"], layers: tuple[LayerRows, ...], damping: float
    ) -> Float[Tensor, "K P_b"]:
        return self._solved(combine(layers, c), damping)

    def sandwich(  # noqa: D102
        self,
        left: tuple[LayerRows, ...],
        right: tuple[LayerRows, ...],
        damping: float,
        relation: RowRelation,  # noqa: ARG002
    ) -> Float[Tensor, "Q R"]:
        return times(left, self._solved(dense(right), damping)).T

    def to_dense(self) -> Float[Tensor, "P_b P_b"]:  # noqa: D102
        vectors = self.eigen.vectors
        return ((vectors * self._values) @ vectors.mT).to(self.inverse)

    def eigenvalues(self) -> Float[Tensor, " k"]:  # noqa: D102
        return self._values

    def trace(self) -> float:  # noqa: D102
        return float(self._values.sum())

    def state(self) -> BlockState:  # noqa: D102
        return {"inverse": self.inverse, "weight": self._weight, "updates": float(self._updates)}

    def restore(self, state: BlockState) -> None:  # noqa: D102
        inverse, weight, updates = state["inverse"], state["weight"], state["updates"]
        assert isinstance(inverse, Tensor)
        assert isinstance(weight, float)
        assert isinstance(updates, float)
        self._inverse, self._weight, self._updates, self._system = inverse, weight, int(updates), None


def woodbury(
    inverse: Float[Tensor, "n n"], x: Float[Tensor, "R n"], keep: float, add: float, name: str
) -> Float[Tensor, "n n"]:
    """Return `(κ G + β XᵀX)⁻¹`, n rows at a time.

    Args:
        inverse: G⁻¹.
        x: X.
        keep: κ.
        add: β.
        name: of the layers, for messages.

    Raises:
        NotPositiveDefinite: if G⁻¹ has an eigenvalue that is not positive, as by rounding.

    Cost: `R n (2n + min(R, n))`.
    """
    for rows in (x * add**0.5).split(max(1, len(inverse))):
        z = rows @ inverse
        small = rows @ z.mT
        small.diagonal().add_(keep)
        factor, info = torch.linalg.cholesky_ex(small)
        if bool(info):
            raise _not_positive(inverse, x, name, "Use a decay nearer to 1, a lower rate, or float64.")
        half = torch.linalg.solve_triangular(factor, z, upper=False)
        inverse, keep = _symmetric(inverse - half.mT @ half) / keep, 1.0
    return inverse


def first_order(
    inverse: Float[Tensor, "n n"], x: Float[Tensor, "R n"], keep: float, add: float, name: str
) -> Float[Tensor, "n n"]:
    """Return `(2 − κ) G⁻¹ − β G⁻¹XᵀX G⁻¹`, see `woodbury`.

    Raises:
        NotPositiveDefinite: if it has an eigenvalue that is not positive: the recursion diverges from there.

    Cost: `2 R n² + n³/3`.
    """
    z = x @ inverse
    after = _symmetric((2 - keep) * inverse - add * (z.mT @ z))
    if bool(torch.linalg.cholesky_ex(after).info):
        largest = float(torch.linalg.eigvalsh(_symmetric(x @ z.mT)).max()) if bool(z.isfinite().all()) else inf
        raise _not_positive(
            after,
            x,
            name,
            f"The first-order recursion diverges, as the largest eigenvalue of G⁻¹F, {largest:.3g}, is above "
            f"{(2 - keep) / add:.3g}. Use recursion='woodbury', a lower rate, or a scale above λ_max(F).",
        )
    return after


RECURSIONS: Mapping[
    Recursion, Callable[[Float[Tensor, "n n"], Float[Tensor, "R n"], float, float, str], Float[Tensor, "n n"]]
] = {"woodbury": woodbury, "first-order": first_order}
"""How an inverse takes rows in."""


def _symmetric(matrix: Float[Tensor, "n n"]) -> Float[Tensor, "n n"]:
    return (matrix + matrix.mT) / 2


def _not_positive(matrix: Float[Tensor, "n n"], x: Float[Tensor, "R n"], name: str, why: str) -> Exception:
    """Return the error for an inverse that is not positive."""
    if not bool(x.isfinite().all() and matrix.isfinite().all()):
        return FloatingPointError(f"layers {name}: rows or their products overflow, as after a run has diverged.")
    lowest = float(torch.linalg.eigvalsh(matrix.double()).min())
    return NotPositiveDefinite(f"layers {name}: the inverse has the eigenvalue {lowest:.3g}. {why}")


class AdaptiveInverse(
    Structure,
    key="adaptive-inverse",
    summary="the inverse of a running average of F, by recursion",
    look=Look("#0000CC", "8", "adaptive inverse"),
):
    """`G⁻¹` of a running average G of Fisher matrices that starts at a multiple of the identity (adaptive natural gradient).

    The matrix that all verbs speak of is G, which the identity makes positive definite: `solve` without damping is one product.
    After `update(rows, decay=0)`, or the first, it is `(w₀ G₀ + w F)/(w₀ + w)` with `G₀ = scale·I`, `w₀ = prior` and the weight w
    of the batch. A decay d then gives the rate `e = w/(d W + w)`, with the weight W before: 1 averages over a data set, and any
    other one comes to `e = 1 − d` with batches of equal weight. A `rate` is used as it is, whatever the decay, unless that is 0.

    By Woodbury, G⁻¹ is the inverse of the averaged matrix and positive definite at any rate. To first order in e it is that near
    the fixed point only; where an eigenvalue of G⁻¹F exceeds (1 + e)/e, it diverges. In directions that no batch visits, G⁻¹
    grows by 1/(1 − e) with every update, by 1 + e to first order; damping bounds the steps there.

    Args:
        partition: groups of parameter names, or names alone, each a block; one block of all parameters if None.
        recursion: "woodbury" or "first-order".
        rate: e, a number in (0, 1), or "c/t" for c over the number of updates, at most ½; from weights and decay if None.
        prior: weight of G₀, in terms of a loss that is a mean, or in batches of one that is a sum.
        scale: of G₀.

    Raises:
        NotPositiveDefinite: on an update, if the first-order recursion diverges, or rounding has eaten up an eigenvalue.

    Cost: `P_b²` numbers of state; per update `R P_b²` and the products of the rows, which are formed; a Cholesky factorisation
    for damped solves, and an eigendecomposition for relative damping and other verbs, once per update.
    Source: Amari, Park & Fukumizu 2000; Park & Lee 2019, whose Fisher matrix is that of exact rows.
    """

    costly = True
    of_optimiser = True

    def __init__(
        self,
        *,
        partition: Sequence[str | Sequence[str]] | None = None,
        recursion: Recursion = "woodbury",
        rate: float | str | None = None,
        prior: float = 1.0,
        scale: float = 1.0,
    ) -> None:
        super().__init__()
        self._partition = as_partition(partition)
        self._adaption = Adaption(recursion, rate, prior, scale)

    @property
    def options(self) -> Mapping[str, object]:
        """The configuration."""
        adaption = self._adaption
        return {
            "partition": self._partition,
            "recursion": adaption.recursion,
            "rate": adaption.rate,
            "prior": adaption.prior,
            "scale": adaption.scale,
        }

    @property
    def usual_decay(self) -> float:
        """That of a long average: where its batches have no gradient, the inverse grows by 1/d with every update."""
        return 0.999

    def _make_blocks(self, rows: Rows) -> list[Block]:
        whole = [(", ".join(layer.name for layer in rows.layers), [layer.layout for layer in rows.layers])]
        blocks = whole if self._partition is None else partition_parts(rows, self._partition)
        return [AdaptiveBlock(name, parts, self._adaption) for name, parts in blocks]
