"""Second moments `Σ x xᵀ`, the factors of a Kronecker product, and their eigenvectors."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import pairwise

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from curvlab.fisher.basis import Basis
from curvlab.fisher.block import BlockState, RunningAverage, Total, weight_of_all, weight_of_batch
from curvlab.fisher.inverse import CholeskyInverse, DiagonalInverse, Inverse, LowRankInverse, MatrixInverse
from curvlab.fisher.system import condition_limit, naming_overflow
from curvlab.rows.aligned import aligned, padded_columns
from curvlab.rows.products import cached, chunks, mirror

STRIPS = 4
"""Strips of columns in which a symmetric product is done; four do five eighths of the whole one's work."""

WORTH_SQUARING = 256
"""Rows of a root in single precision from which on its square is decomposed in double precision instead."""

WORTH_CUTTING = 512
"""Columns from which on strips save more work than they cost a matrix product speed."""


class Factor(ABC):
    """A running average of moments, one a group."""

    @property
    @abstractmethod
    def basis(self) -> Basis:
        """Eigenvectors that span the range."""

    @property
    @abstractmethod
    def shape(self) -> torch.Size:
        """That of the dense inverse."""

    @abstractmethod
    def inverse(self, damping: Float[Tensor, " Q"]) -> Inverse | None:
        """Return `(M + ρI)⁻¹`; None if that takes a factorisation of M as a matrix."""

    @abstractmethod
    def mean_eigenvalue(self) -> Float[Tensor, " Q"]:
        """Return the trace over the dimension."""

    @abstractmethod
    def add_up(self, total: Total) -> None:
        """Turn the average over a part of a data set into that over the parts of all processes."""

    @abstractmethod
    def state(self) -> BlockState:
        """Return what `restore` needs."""

    @abstractmethod
    def restore(self, state: BlockState) -> None:
        """Bring a saved state back."""


class Moment(Factor):
    """A running average of `[Q, d, d]` moments, stored and decomposed on its smaller side.

    Kept as roots X with `XᵀX = Σ_b w_b M_b` while they have fewer rows than columns: their singular value
    decomposition has twice the digits of the moment's eigendecomposition.

    Args:
        rtol: eigenvalues up to `rtol·λ_max` count as null; if None, `d·ε`, for roots its square.
        complete: whether the basis spans the whole space, not only the range.
    """

    def __init__(self, rtol: float | None, *, complete: bool = False) -> None:
        self.rtol = rtol
        self.complete = complete
        self.weight, self.additive = 0.0, False
        self.root: Tensor | None = None
        self.matrix: Tensor | None = None
        self._basis: Basis | None = None
        self._mirrored = True

    def update(
        self,
        root: Float[Tensor, "Q m t d"],
        weight: float,
        decay: float,
        *,
        scale: float = 1.0,
        additive: bool = False,
        total: Total | None = None,
    ) -> None:
        """Add a moment M of some weight w, `scale·Σ_{m,t} x xᵀ = w·M` over x in the root; decays and sums as in `RunningAverage`.

        With `total`, the products and weights of several processes add up to those of their batch.
        """
        self._basis, self.additive = None, additive
        if total is not None:
            weight = weight_of_batch(weight, additive, total, root)
        fresh = decay == 0 or self.weight == 0
        if fresh:
            self.root, self.matrix, self._mirrored = None, None, True
        held = 0 if self.root is None else self.root.shape[1]
        if total is not None:
            self._add_shared(root, decay, scale, total)
        elif self.matrix is None and held + root.shape[1] * root.shape[2] < root.shape[3]:
            fresh_root = root.flatten(1, 2) * scale**0.5
            self.root = fresh_root if self.root is None else torch.cat([self.root * decay**0.5, fresh_root], dim=1)
        else:
            if self.matrix is None:
                self.matrix = _zeros(root)
                self._square()
            self._add(root, decay, scale)
        if fresh:
            self.weight = weight
        elif not (additive and decay == 1):
            self.weight = decay * self.weight + weight

    def _add_shared(self, root: Float[Tensor, "Q m t d"], decay: float, scale: float, total: Total) -> None:
        part = Moment(self.rtol)
        part.matrix = root.new_zeros(len(root), *2 * root.shape[3:])
        part._add(root, 0.0, scale)
        if self.matrix is None:
            self.matrix = _zeros(root)
        self.matrix.mul_(decay).add_(total(part.matrix))
        self._mirrored = False

    def _add(self, root: Float[Tensor, "Q m t d"], decay: float, scale: float) -> None:
        """Decay the matrix in place and add `scale·Σ x xᵀ`, on and above the diagonal; the rest waits for `_mirror`."""
        assert self.matrix is not None
        for part, piece in enumerate(_pieces(root)):
            for rows, columns in _strips(root.shape[3]):
                strip = self.matrix[:, rows, columns]
                beta = decay if part == 0 else 1.0
                strip.baddbmm_(piece[..., rows].mT, piece[..., columns], beta=beta, alpha=scale)
        self._mirrored = False

    def _square(self) -> None:
        """Add what is kept as a root to a matrix of zeros."""
        if self.root is not None:
            self._add(self.root[:, :, None], 0.0, 1.0)
            self.root = None

    def add_up(self, total: Total) -> None:  # noqa: D102
        if self.root is not None:
            self.matrix = _zeros(self.root[:, :, None])
            self._square()
        assert self.matrix is not None
        self.matrix.copy_(total(self.matrix))
        self.weight = weight_of_all(self.weight, self.additive, total, self.matrix)
        self._basis = None

    def _mirror(self) -> None:
        """Complete the matrix from what is on and above its diagonal."""
        assert self.matrix is not None
        if not self._mirrored:
            mirror(self.matrix)
            self._mirrored = True

    @property
    def shape(self) -> torch.Size:  # noqa: D102
        if self.matrix is not None:
            return self.matrix.shape
        assert self.root is not None
        return torch.Size((len(self.root), *2 * self.root.shape[2:]))

    def inverse(self, damping: Float[Tensor, " Q"]) -> Inverse | None:
        """Return `(XᵀX + ρI)⁻¹ = (I − Xᵀ(XXᵀ + ρI)⁻¹X)/ρ` while the moment is kept as a root X."""
        if self.root is None:
            return None
        root, rho = self.root / self._divisor**0.5, damping[:, None]
        small = root @ root.mT
        diagonal = small.diagonal(dim1=1, dim2=2).add_(rho)
        triangle, info = torch.linalg.cholesky_ex(small)
        if not bool(((info == 0) & (diagonal.amax(-1) / damping < condition_limit(root.dtype))).all()):
            return _inverse_by_eigenvectors(self, damping)
        half = torch.linalg.solve_triangular(triangle, root * rho[..., None].rsqrt(), upper=False)
        inverse = LowRankInverse(half, damping)
        return inverse if 2 * half.shape[1] < half.shape[2] else MatrixInverse(inverse.dense())

    def regularise(self, damping: Float[Tensor, " Q"], out: Float[Tensor, "Q w w"]) -> None:
        """Write `M + ρI` on and above the diagonal of `out`, for a moment that is kept as a matrix.

        It is continued to the width of its memory by a multiple of the unit matrix, the first pivot of its Cholesky
        factorisation.
        """
        assert self.matrix is not None
        d = self.matrix.shape[-1]
        for rows, columns in _strips(d):
            torch.div(self.matrix[:, rows, columns], self._divisor, out=out[:, rows, columns])
        out[:, :, d:] = 0
        diagonal = out.diagonal(dim1=1, dim2=2)
        diagonal[:, :d] += damping[:, None]
        diagonal[:, d:] = diagonal[:, :1]

    @property
    def basis(self) -> Basis:  # noqa: D102
        if self._basis is None:
            self._basis = self._from_matrix() if self.root is None else self._from_root(self.root)
        return self._basis

    def _from_root(self, root: Tensor) -> Basis:
        if root.dtype == torch.float32 and len(root) == 1 and root.shape[1] >= WORTH_SQUARING and not self.complete:
            squared = self._from_squared_root(root)
            if squared is not None:
                return squared
        _, singular, vectors = torch.linalg.svd(root, full_matrices=self.complete)
        singular = nn.functional.pad(singular, (0, vectors.shape[1] - singular.shape[1]))
        eps = torch.finfo(root.dtype).eps
        tolerance = root.shape[2] * eps if self.rtol is None else self.rtol**0.5
        null = singular <= tolerance * singular.amax(-1, keepdim=True)
        return Basis((singular.square()[:, None] / self._divisor)[:, 0], vectors.mT, null)

    def _from_squared_root(self, root: Float[Tensor, "1 m d"]) -> Basis | None:
        """Decompose `XXᵀ` in double precision, which keeps all digits of singular values in single precision above the tolerance.

        None for a root of zeros. Cost: about half of a singular value decomposition's; null directions are left out.
        """
        exact = root[0].double()
        values, left = torch.linalg.eigh(exact @ exact.mT)
        singular = values.clamp_min(0).sqrt()
        eps = torch.finfo(root.dtype).eps
        tolerance = root.shape[2] * eps if self.rtol is None else max(self.rtol**0.5, eps)
        kept = singular > tolerance * singular[-1]
        if not bool(kept.any()):
            return None
        vectors = exact.mT @ (left[:, kept] / singular[kept])
        found = (singular[kept].square() / self._divisor).view(1, -1).to(root.dtype)
        return Basis(found, vectors[None].to(root.dtype), torch.zeros_like(found, dtype=torch.bool))

    @property
    def _divisor(self) -> float | Float[Tensor, "Q 1 1"]:
        """What the sum of products is divided by: its weight; 1 while no sample had any, so that the moment is zero."""
        return self.weight or 1.0

    def _from_matrix(self) -> Basis:
        return self._spanned(*_eigh(self.dense()))

    def _spanned(self, values: Float[Tensor, "Q d"], vectors: Float[Tensor, "Q d d"]) -> Basis:
        tolerance = values.shape[-1] * torch.finfo(values.dtype).eps if self.rtol is None else self.rtol
        null = values <= tolerance * values.amax(-1, keepdim=True)
        return Basis(values.clamp_min(0), vectors, null)

    def dense(self) -> Float[Tensor, "Q d d"]:
        """Form the moment."""
        if self.root is not None:
            return self.root.mT @ self.root / self._divisor
        assert self.matrix is not None
        self._mirror()
        return self.matrix / self._divisor

    def mean_eigenvalue(self) -> Float[Tensor, " Q"]:  # noqa: D102
        return (self._traces()[:, None, None] / self._divisor)[:, 0, 0] / self.shape[2]

    def _traces(self) -> Float[Tensor, " Q"]:
        """Return the traces of the sums of products."""
        if self.root is not None:
            return self.root.square().sum((1, 2))
        assert self.matrix is not None
        return self.matrix.diagonal(dim1=1, dim2=2).sum(-1)

    def state(self) -> BlockState:  # noqa: D102
        if self.matrix is not None:
            self._mirror()
        return {
            "root": self.root,
            "matrix": None if self.matrix is None else self.matrix.clone(),
            "weight": self.weight,
        }

    def restore(self, state: BlockState) -> None:  # noqa: D102
        root, matrix, weight = state["root"], state["matrix"], state["weight"]
        assert root is None or isinstance(root, Tensor)
        assert matrix is None or isinstance(matrix, Tensor)
        assert isinstance(weight, float)
        self.root, self.matrix = root, None if matrix is None else aligned(matrix.shape, matrix).copy_(matrix)
        self.weight, self._basis, self._mirrored = weight, None, True


def decompose(moments: Iterable[Moment]) -> None:
    """Find the eigenvectors of moments that are kept as matrices, those of one width in one call where that is faster."""
    alike: dict[tuple[torch.Size, torch.dtype, torch.device], list[Moment]] = defaultdict(list)
    for moment in moments:
        if moment._basis is None and moment.matrix is not None and _faster_together(moment.matrix.device):
            alike[moment.matrix.shape, moment.matrix.dtype, moment.matrix.device].append(moment)
    for ((Q, *_), *_), group in alike.items():
        values, vectors = _eigh(torch.cat([moment.dense() for moment in group]))
        for moment, own, directions in zip(group, values.split(Q), vectors.split(Q), strict=True):
            moment._basis = moment._spanned(own, directions)


def _faster_together(device: torch.device) -> bool:
    """Whether matrices are decomposed faster in one call than one after the other."""
    return device.type != "cpu"


def _eigh(matrix: Float[Tensor, "Q d d"]) -> tuple[Float[Tensor, "Q d"], Float[Tensor, "Q d d"]]:
    """Decompose symmetric matrices, in double precision where the routine for single precision does not converge.

    That happens on some processors, for ill-conditioned matrices.
    """
    try:
        values, vectors = torch.linalg.eigh(matrix)
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
        with naming_overflow(matrix, "A factor's second moment"):
            values, vectors = torch.linalg.eigh(matrix.double())
    return values.to(matrix.dtype), vectors.to(matrix.dtype)


def _zeros(root: Float[Tensor, "Q m t d"]) -> Float[Tensor, "Q d d"]:
    return aligned((len(root), *2 * root.shape[3:]), root).zero_()


def _strips(d: int) -> Iterator[tuple[slice, slice]]:
    """Cut a symmetric matrix into strips of columns, of which each takes the rows down to its last diagonal entry."""
    strips = STRIPS if d >= WORTH_CUTTING else 1
    for start, stop in pairwise(d * k // strips for k in range(strips + 1)):
        yield slice(0, stop), slice(start, stop)


def _pieces(root: Float[Tensor, "Q m t d"]) -> Iterator[Float[Tensor, "Q n d"]]:
    """Yield matrices that stack up to the root, copies of some of it at a time where it is not laid out as one."""
    Q, m, t, d = root.shape
    as_one = t == 1 or root.stride(1) == t * root.stride(2)
    for part in [slice(None)] if as_one else chunks(m, Q * t * d, cached(root.device)):
        yield root[:, part].flatten(1, 2)


class DiagonalMoment(Factor):
    """A running average of the diagonals of moments, one a group: all there is of one-hot vectors, and of vectors too long.

    Args:
        rtol: eigenvalues up to `rtol·λ_max` count as null; those of zero if None.
    """

    def __init__(self, rtol: float | None = None) -> None:
        self.rtol = rtol
        self.average = RunningAverage()

    def update(
        self,
        diagonal: Float[Tensor, "Q d"],
        weight: float,
        decay: float,
        *,
        additive: bool = False,
        total: Total | None = None,
    ) -> None:
        """Add a diagonal D of some weight w, given as `w·D`; see `Moment.update`."""
        self.average.update(diagonal, weight, decay, additive=additive, total=total)

    def add_up(self, total: Total) -> None:  # noqa: D102
        self.average.add_up(total)

    @property
    def basis(self) -> Basis:  # noqa: D102
        values = self.values
        return Basis(values, None, values <= (self.rtol or 0.0) * values.amax(-1, keepdim=True))

    @property
    def values(self) -> Float[Tensor, "Q d"]:
        """The diagonals."""
        return self.average.value

    @property
    def shape(self) -> torch.Size:  # noqa: D102
        return self.values.shape

    def inverse(self, damping: Float[Tensor, " Q"]) -> DiagonalInverse:  # noqa: D102
        return DiagonalInverse((self.values + damping[:, None]).reciprocal())

    def mean_eigenvalue(self) -> Float[Tensor, " Q"]:  # noqa: D102
        return self.values.mean(-1)

    def state(self) -> BlockState:  # noqa: D102
        return self.average.state()

    def restore(self, state: BlockState) -> None:  # noqa: D102
        self.average.restore(state)


Invert = Callable[[Sequence[tuple[Factor, Tensor]], int], list[Inverse]]
"""Returns `(M + ρI)⁻¹` of factors M and ρ, one a group, for a number of products: see `inverses`."""


def inverses(wanted: Sequence[tuple[Factor, Float[Tensor, " _"]]], uses: int) -> list[Inverse]:
    """Return `(M + ρI)⁻¹` of several factors and ρ, for some number of products.

    Moments that are kept as matrices are continued to the width of their memory. Those of one width are factorised in
    one batched call; on a CPU a single group's inverse is kept as its Cholesky factor. Where a Cholesky factorisation fails
    or cannot be trusted, the inverse comes from the eigenvectors.

    Cost: `d³/6` for a Cholesky factorisation and `d³/3` for the inverse of its product; `r·d·(d + r)` for a moment kept as
    a root of r rows, `r²·d` if they are few.
    """
    found: dict[int, Inverse] = {}
    alike: dict[tuple[int, int, torch.dtype], dict[int, Moment]] = defaultdict(dict)
    for position, (factor, rho) in enumerate(wanted):
        inverse = factor.inverse(rho)
        if inverse is not None:
            found[position] = inverse
            continue
        assert isinstance(factor, Moment)
        Q, d, _ = factor.shape
        alike[Q, padded_columns(d, rho.dtype), rho.dtype][position] = factor
    for (Q, width, _), moments in alike.items():
        whole = wanted[next(iter(moments))][1].new_empty(len(moments), Q, width, width)
        for (position, moment), matrix in zip(moments.items(), whole, strict=True):
            moment.regularise(wanted[position][1], matrix)
        roots, info = _cholesky(whole.mT)
        pivots = roots.diagonal(dim1=-2, dim2=-1)
        trusted = (pivots.amax(-1) / pivots.amin(-1)).square() < condition_limit(roots.dtype)
        safe = ((info == 0) & trusted).all(-1).tolist()
        for position, root, good in zip(moments, roots, safe, strict=True):
            factor, rho = wanted[position]
            found[position] = _of_root(root, factor, uses) if good else _inverse_by_eigenvectors(factor, rho)
    return [found[position] for position in range(len(wanted))]


def _cholesky(matrices: Float[Tensor, "k Q w w"]) -> tuple[Float[Tensor, "k Q w w"], Int[Tensor, "k Q"]]:
    """Factorise matrices that are laid out column by column; on a CPU in place, which saves a copy."""
    if matrices.device.type != "cpu":
        roots, info = torch.linalg.cholesky_ex(matrices)
        return roots, info
    info = matrices.new_empty(matrices.shape[:-2], dtype=torch.int32)
    torch.linalg.cholesky_ex(matrices, out=(matrices, info))
    return matrices, info


def _of_root(root: Float[Tensor, "Q w w"], factor: Factor, uses: int) -> Inverse:
    d = factor.shape[-1]
    if len(root) == 1 and root.device.type == "cpu":
        return CholeskyInverse(root, d, uses)
    return MatrixInverse(torch.cholesky_inverse(root)[..., :d, :d])


def _inverse_by_eigenvectors(factor: Factor, damping: Float[Tensor, " Q"]) -> MatrixInverse:
    basis, rho = factor.basis, damping[:, None, None]
    assert basis.vectors is not None
    values = basis.values[..., None]
    shrunk = (basis.vectors * (values / (values + rho)).mT) @ basis.vectors.mT
    return MatrixInverse((torch.eye(shrunk.shape[-1], dtype=shrunk.dtype, device=shrunk.device) - shrunk) / rho)
