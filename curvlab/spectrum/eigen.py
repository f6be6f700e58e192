"""Extreme eigenpairs of a symmetric operator: a block Krylov method with thick restarts, started from what is known.

    basis V, images AV     →  Rayleigh–Ritz: eigenpairs (θ, x) with x = Vs, s and θ of VᵀAV
    residuals r = Ax − θx  →  those of the wanted Ritz pairs that have not converged widen the basis
    basis full             →  it is cut down to the leading Ritz vectors, whose images come along

The first block X may be the eigenvectors of a similar operator: one block product tells how good they still are, and the
following ones improve on those that are wanted, while the others keep theirs out of the way. Widening by all residuals
of the block would span the block Krylov space of X, at almost twice the products. The images are kept and no recurrence is
relied on. It is a block Davidson method without a preconditioner, and it is Krylov–Schur
with full re-orthogonalisation when X is a Krylov space.

For an operator that is symmetric in another inner product (`Operator.metric`), everything is orthogonal in that one.

Source: Stathopoulos & Saad 1998, Restarting techniques for the (Jacobi-)Davidson symmetric eigenvalue methods;
Stathopoulos & Wu 2002, A block orthogonalization procedure with constant synchronization requirements.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from math import isfinite
from typing import Literal, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from curvlab.errors import NotPositiveDefinite, unknown_name
from curvlab.spectrum.operator import Operator, check_operator
from curvlab.tools.shown import line, table

Which = Literal["largest", "smallest", "both"]

GUARDS = 2
"""Vectors of a block beyond those that are asked for."""
BLOCKS = 8
"""Blocks in a basis, beside the leading Ritz vectors."""
KEPT = 2
"""Blocks that a restart keeps, beside the leading Ritz vectors."""
SMALL = 4
"""A space of at most so many bases is not worth a restart: the basis may fill it."""
DENSE = 2048
"""A basis may fill a space of at most so many dimensions."""
WHOLE = 3
"""Such a space is taken whole once one product for so many dimensions has been spent on it."""
ENOUGH = 0.1
"""Unit vectors that keep so much of their square in every direction are orthogonal after one projection."""
ROUND_OFF = 10
"""Residuals up to so many ε·max|θ| are round-off."""


class NotConverged(UserWarning):
    """Eigenpairs whose residuals are above the tolerance after the last product that was allowed."""


@dataclass(frozen=True, eq=False)
class Eigenpairs:
    """Eigenpairs with bounds on their errors.

    Attributes:
        values: eigenvalues θ, the outermost first; for "both" the k largest and then the k smallest, all descending.
        vectors: of norm 1 in the operator's inner product, one a row.
        residuals: `‖Ax − θx‖` in the norm of that inner product; an eigenvalue lies within this distance of θ.
        converged: which residuals are within the tolerance.
        products: products with single vectors that it took.
        block_products: products with blocks that it took.
        subspace: the vectors, and those that come next; what the next call starts from.
    """

    values: Float[Tensor, " k"]
    vectors: Float[Tensor, "k P"]
    residuals: Float[Tensor, " k"]
    converged: Bool[Tensor, " k"]
    products: int
    block_products: int
    subspace: Float[Tensor, "m P"]

    def __repr__(self) -> str:
        found = int(self.converged.sum())
        state = "converged" if found == len(self.values) else f"{found} of {len(self.values)} converged"
        accuracy = f"residuals ≤ {float(self.residuals.max()):.1g}"
        return line(self, accuracy, state, f"{self.products} products", k=len(self.values), values=self.values)

    def _repr_html_(self) -> str:
        columns = (self.values.tolist(), self.residuals.tolist(), self.converged.tolist())
        rows = zip(*columns, strict=True)
        return table(self, ("eigenvalue", "residual", "converged"), rows)


def eigenpairs(
    operator: Operator,
    k: int = 1,
    which: Which = "largest",
    *,
    tolerance: float = 1e-4,
    start: Eigenpairs | Float[Tensor, "m P"] | None = None,
    block: int | None = None,
    max_products: int = 10_000,
) -> Eigenpairs:
    """Return extreme eigenpairs of a symmetric operator.

    Args:
        operator: symmetric, in its own inner product if it has one.
        k: how many; from either end for "both", together at most P.
        which: "largest" and "smallest" go by the sign, too, not by the modulus.
        tolerance: pairs count as converged when `‖Ax − θx‖ ≤ tolerance·max|θ|`, the maximum being over all Ritz values.
            The error of θ is at most the residual, and about its square over the distance to the other eigenvalues.
            Below `10·ε` of the operator's type it counts as that.
        start: result for this or a similar operator, or any vectors to start from; random ones if None.
        block: vectors in the first product and in `subspace`, by default two more than are asked for. From a good start
            the distance of the wanted eigenvalues to the first one beyond the block decides on the convergence, so a
            block as wide as a cluster passes over it; and a block finds as many copies of a multiple eigenvalue as it
            is wide.
        max_products: products with single vectors after which the best pairs so far are returned; at most P.

    Raises:
        ValueError: for options out of range, a start of another size, products that are not finite, and an operator that is not
            symmetric.
        NotPositiveDefinite: if the operator's inner product is none.

    Warns:
        NotConverged: if `max_products` did not suffice.

    Cost: beside the products about `7·m·P` operations a vector, m being the number of vectors in the basis, at most
    `k + 8·block`; memory `2·m·P`, `3·m·P` with an inner product of its own. Where the basis fills the whole space, the
    result is that of a dense decomposition. What the start is exactly orthogonal to stays unseen, as in all Krylov
    methods; random starts make that improbable.
    """
    check_operator(operator)
    if isinstance(k, bool) or not isinstance(k, int):
        raise ValueError(f"k is a whole number of eigenpairs, got {k!r}.")
    wanted = 2 * k if which == "both" else k
    if which not in get_args(Which):
        raise unknown_name("end of the spectrum", which, get_args(Which))
    if not 1 <= wanted <= operator.size:
        raise ValueError(f"There are {operator.size} eigenpairs; k={k} with which={which!r} asks for {wanted}.")
    if not (isfinite(tolerance) and tolerance >= 0):
        raise ValueError(f"tolerance is a finite number ≥ 0, got {tolerance}.")
    if block is not None and block < 1:
        raise ValueError(f"block is a number of vectors ≥ 1, got {block}.")
    if max_products < 1:
        raise ValueError(f"max_products must be at least 1, got {max_products}.")
    width = min(operator.size, block or wanted + GUARDS)
    capacity = max(wanted, width) + BLOCKS * width
    whole = operator.size <= max(SMALL * capacity, DENSE)
    basis = _Basis(operator, width, operator.size if whole else capacity)
    max_products = min(max_products, operator.size)
    with operator.held():
        basis.begin(start)
        while True:
            ritz = basis.ritz(which, wanted)
            limit = max(tolerance, ROUND_OFF * torch.finfo(operator.dtype).eps) * ritz.largest
            unconverged = ritz.norms > limit
            if basis.spans_all:
                limit = max(limit, torch.finfo(operator.dtype).eps ** 0.5 * ritz.largest)
                unconverged = ritz.norms > limit
            complete = len(ritz.values) >= wanted and not bool(unconverged.any())
            if complete or basis.spans_all or basis.products >= max_products:
                break
            if basis.is_full:
                basis.restart(ritz.coefficients)
            if whole and operator.size > SMALL * capacity and WHOLE * basis.products >= operator.size:
                basis.take_all()
            else:
                basis.widen(
                    ritz.residuals[unconverged.to(operator.device)][: min(width, max_products - basis.products)]
                )
    found = _result(ritz, ~unconverged, which, basis)
    if not bool(found.converged.all()):
        warnings.warn(
            f"{int((~found.converged).sum())} of {wanted} eigenpairs have residuals above {limit:.2e}, up to "
            f"{float(found.residuals.max()):.2e}, after {basis.products} products. Raise max_products or tolerance, or "
            "use a wider block.",
            NotConverged,
            stacklevel=2,
        )
    return found


@dataclass(frozen=True)
class _Ritz:
    """Leading Ritz pairs, most wanted first.

    Attributes:
        values: θ, in float64.
        coefficients: s, one a row, in the basis; of all Ritz vectors.
        residuals: `Ax − θx`, one a row.
        norms: of the residuals, in float64.
        largest: max|θ| over all Ritz values.
    """

    values: Float[Tensor, " m"]
    coefficients: Float[Tensor, "b b"]
    residuals: Float[Tensor, "m P"]
    norms: Float[Tensor, " m"]
    largest: float


class _Basis:
    """An orthonormal basis V with its images AV, and MV where the inner product is not the Euclidean one."""

    def __init__(self, operator: Operator, width: int, capacity: int) -> None:
        self.operator, self.width = operator, width
        self.products = self.block_products = 0
        self.spans_all = False
        self._generator = torch.Generator().manual_seed(0)
        self._allocate(capacity)

    def _allocate(self, capacity: int) -> None:
        """Start afresh with room for so many vectors."""
        self.count = 0
        shape = (capacity, self.operator.size)
        self._vectors = torch.empty(shape, dtype=self.operator.dtype, device=self.operator.device)
        self._images = torch.empty_like(self._vectors)
        self._duals = self._vectors if self.operator.euclidean else torch.empty_like(self._vectors)
        self._projected = torch.zeros(capacity, capacity, dtype=torch.float64, device="cpu")

    def begin(self, start: Eigenpairs | Tensor | None) -> None:
        """Take the start, and random vectors if it is narrower than a block."""
        given = start.subspace if isinstance(start, Eigenpairs) else start
        if given is None:
            given = self._vectors[:0]
        if given.ndim != 2 or given.shape[1] != self.operator.size:
            raise ValueError(
                f"start holds vectors of {self.operator.size} entries, one a row; got {tuple(given.shape)}."
            )
        if not bool(given.sum().isfinite()):
            raise ValueError("start holds vectors that are not finite.")
        room = len(self._vectors)
        block = torch.cat([given[:room].to(self._vectors), self._random(max(0, self.width - len(given)))])
        self.widen(self.operator.project(block))

    @property
    def is_full(self) -> bool:
        """Whether a block does not fit any more, although the space has room for it."""
        return self.count + self.width > len(self._vectors) < self.operator.size

    def ritz(self, which: Which, number: int) -> _Ritz:
        """Return the leading Ritz pairs."""
        V, W = self._vectors[: self.count], self._images[: self.count]
        values, s = torch.linalg.eigh(self._projected[: self.count, : self.count])
        order = _priority(which, self.count)
        leading = s[:, order].T.to(V)
        theta, kept = values[order[:number]], leading[:number]
        residuals = torch.addmm(kept @ W, theta.to(V)[:, None] * kept, V, alpha=-1)
        norms = (residuals * self.operator.metric(residuals)).sum(1).clamp_min(0).sqrt().double().cpu()
        return _Ritz(theta, leading, residuals, norms, float(values.abs().max()))

    def combine(self, coefficients: Float[Tensor, "j b"]) -> Float[Tensor, "j P"]:
        """Return vectors of the space that the basis spans."""
        return coefficients @ self._vectors[: self.count]

    def widen(self, block: Float[Tensor, "K P"]) -> None:
        """Add what is new in a block, random vectors if nothing is."""
        if not self._append(block):
            self.spans_all = not self._append(self.operator.project(self._random(self.width)))

    def take_all(self) -> None:
        """Let the basis span the whole space, with what it holds already."""
        while self.count < self.operator.size:
            if not self._append(self.operator.project(self._random(self.operator.size - self.count))):
                break
        self.spans_all = True

    def restart(self, coefficients: Float[Tensor, "j b"]) -> None:
        """Keep the leading Ritz vectors and their images only."""
        kept = coefficients[: len(self._vectors) - (BLOCKS - KEPT) * self.width]
        stores = {id(store): store for store in (self._vectors, self._images, self._duals)}
        for store in stores.values():
            store[: len(kept)] = kept @ store[: self.count]
        s = kept.double().cpu()
        self._projected[: len(kept), : len(kept)] = s @ self._projected[: self.count, : self.count] @ s.T
        self.count = len(kept)

    def _append(self, block: Float[Tensor, "K P"]) -> bool:
        """Orthonormalise a block against the basis and add it with its images; returns whether anything was new."""
        fresh = self._orthonormal(block)[: len(self._vectors) - self.count] if len(block) else block
        if not len(fresh):
            return False
        images = self.operator.checked_matmat(fresh)
        before, self.count = self.count, self.count + len(fresh)
        self._vectors[before : self.count], self._images[before : self.count] = fresh, images
        if not self.operator.euclidean:
            self._duals[before : self.count] = self.operator.metric(fresh)
        cross = (self._duals[: self.count] @ images.T).double().cpu()
        mirrored = (self._images[: self.count] @ self._duals[before : self.count].T).double().cpu()
        asymmetry, largest = float((cross - mirrored).norm()), float(mirrored.norm() + images.norm())
        if not asymmetry <= self._eps**0.25 * largest:
            raise ValueError(
                f"{self.operator!r} is not symmetric: xᵀAy and yᵀAx differ by {asymmetry:.2g}, beside {largest:.2g}. Eigenpairs "
                "are of symmetric operators; give (A + Aᵀ)/2, or mend the product."
            )
        cross[before:] = (cross[before:] + cross[before:].T) / 2
        self._projected[: self.count, before : self.count] = cross
        self._projected[before : self.count, : self.count] = cross.T
        self.products += len(fresh)
        self.block_products += 1
        self.spans_all = self.count == self.operator.size
        return True

    def _orthonormal(self, block: Float[Tensor, "K P"]) -> Float[Tensor, "J P"]:
        """Return an orthonormal basis of what a block adds."""
        V, MV = self._vectors[: self.count], self._duals[: self.count]
        duals = self.operator.metric(block)
        squares = (block * duals).sum(1)
        if bool((squares < 0).any()) and bool(
            (squares < -(self._eps**0.5) * block.norm(dim=1) * duals.norm(dim=1)).any()
        ):
            raise NotPositiveDefinite(
                f"The inner product of {self.operator!r} is not positive: xᵀMx = {float(squares.min()):.3g} for some x. "
                "Use a larger damping, or a positive preconditioner."
            )
        if not bool((squares > 0).all()):
            block, squares = block[squares > 0], squares[squares > 0]
        lengths = squares.sqrt().double().cpu()
        for _ in range(2):
            if not len(block):
                break
            block = torch.addmm(block, block @ MV.T, V, alpha=-1)
            gram = (block @ self.operator.metric(block).T).double().cpu() / torch.outer(lengths, lengths)
            values, vectors = torch.linalg.eigh(gram)
            new = values > 10 * len(block) * self._eps
            block = (vectors[:, new] / lengths[:, None] / values[new].sqrt()).T.to(block) @ block
            lengths = torch.ones(len(block), dtype=torch.float64, device="cpu")
            if float(values.min()) > ENOUGH:
                break
        return block

    @property
    def _eps(self) -> float:
        return torch.finfo(self.operator.dtype).eps

    def _random(self, number: int) -> Float[Tensor, "K P"]:
        shape = (number, self.operator.size)
        return torch.randn(shape, generator=self._generator, dtype=self.operator.dtype, device="cpu").to(
            self.operator.device
        )


def _priority(which: Which, count: int) -> list[int]:
    """Return the order in which ascending eigenvalues are wanted."""
    ascending = list(range(count))
    if which == "smallest":
        return ascending
    if which == "largest":
        return ascending[::-1]
    return [ascending[i // 2] if i % 2 else ascending[-1 - i // 2] for i in ascending]


def _result(ritz: _Ritz, converged: Bool[Tensor, " m"], which: Which, basis: _Basis) -> Eigenpairs:
    order = torch.arange(len(ritz.values), device="cpu")
    if which == "both":
        order = ritz.values.argsort(descending=True)
    subspace = basis.combine(ritz.coefficients[: max(len(order), basis.width)])
    return Eigenpairs(
        values=ritz.values[order],
        vectors=subspace[order.to(subspace.device)],
        residuals=ritz.norms[order],
        converged=converged[order],
        products=basis.products,
        block_products=basis.block_products,
        subspace=subspace,
    )
