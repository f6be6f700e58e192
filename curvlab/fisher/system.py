"""Damped solves with symmetric positive semi-definite matrices, and what is done when they are ill-conditioned.

In this order: symmetrise and Cholesky; the same in float64 (from the factors, where they are at hand: a Gram matrix
formed in float32 has already lost what is below 1e-7 of its largest eigenvalue); eigendecomposition with negative
eigenvalues set to zero. Anything after the first step is an `IllConditioned` warning with the condition number. Without
damping the solve is the pseudo-inverse: eigenvalues up to `rtol` times the largest count as zero, except in stacks whose
rows differ in norm by design, which are scaled to a unit diagonal first (`scaled`). Eigendecompositions are made in
float64, whatever the matrix is in.
"""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from curvlab.errors import IllConditioned


def rank_tolerance(
    values: Float[Tensor, "*B n"], rtol: float | None, size: int, dtype: torch.dtype
) -> Float[Tensor, "*B 1"]:
    """Return the eigenvalue up to which a direction counts as null: `rtol·λ_max`; if None, `rtol = size·ε(dtype)`."""
    relative = size * torch.finfo(dtype).eps if rtol is None else rtol
    return relative * torch.nn.functional.pad(values.abs(), (0, 1)).amax(-1, keepdim=True)


def inverse_values(values: Float[Tensor, "*B n"], damping: float, null: Bool[Tensor, "*B n"]) -> Float[Tensor, "*B n"]:
    """Return `1/(λ + ρ)`; for ρ = 0 the pseudo-inverse, with 0 on null directions."""
    if damping > 0:
        return 1 / (values + damping)
    return torch.where(null, 0, 1 / torch.where(null, 1, values))


def condition_limit(dtype: torch.dtype) -> float:
    """Return the condition number from which on a solve in a floating-point type is not trusted."""
    return 0.1 / torch.finfo(dtype).eps


@dataclass(frozen=True)
class Eigen:
    """Eigendecomposition in float64 of a symmetric matrix or a stack; `null` marks directions that count as null."""

    values: Float[Tensor, "*B n"]
    vectors: Float[Tensor, "*B n n"]
    null: Bool[Tensor, "*B n"]

    def inverse(self, damping: float) -> Float[Tensor, "*B n"]:
        """Return `1/(λ + ρ)`, for ρ = 0 the pseudo-inverse's."""
        return inverse_values(self.values, damping, self.null)

    def coordinates(self, x: Float[Tensor, "*B K n"]) -> Float[Tensor, "*B K n"]:
        """Return row vectors in the eigenbasis."""
        return x.to(self.vectors) @ self.vectors

    def sandwich(
        self,
        left: Float[Tensor, "*B Q n"],
        right: Float[Tensor, "*B R n"],
        damping: float,
        direct: Callable[[], Float[Tensor, "*B Q R"]],
    ) -> Float[Tensor, "*B Q R"]:
        """Return `x (SᵀS + ρI)⁻¹ yᵀ` for `SSᵀ` this matrix, split into the parts within and outside the span of S.

        Args:
            left: `x Sᵀ`.
            right: `y Sᵀ`.
            damping: ρ; 0 for the pseudo-inverse.
            direct: computes `x yᵀ`, called if there is damping.
        """
        a, b = self.coordinates(left), self.coordinates(right)
        if damping == 0:
            return ((a * self.inverse(0.0).square()[..., None, :]) @ b.mT).to(left)
        reached = self.values > rank_tolerance(self.values, None, self.values.shape[-1], torch.float64)
        projector = inverse_values(self.values, 0.0, ~reached)[..., None, :]
        within = (a * projector * self.inverse(damping)[..., None, :]) @ b.mT
        return (within + (direct() - (a * projector) @ b.mT) / damping).to(left)


class System:
    """A positive semi-definite matrix, or a stack of equal size, to be solved with one damping after another.

    Args:
        matrix: `[n, n]` or `[B, n, n]`.
        name: what it belongs to, for messages.
        rtol: rank tolerance, `n·ε` if None.
        in_float64: recomputes the matrix in float64, if its factors are at hand.
        scaled: whether rows of very different norm are meant: undamped solves then scale the matrix to a unit diagonal
            first, and only rows of norm zero count as null, unless what is left is itself singular.
        symmetric: whether the matrix is so to the last bit; if not, its mean with its transpose is taken.
    """

    def __init__(
        self,
        matrix: Float[Tensor, "*B n n"],
        name: str,
        rtol: float | None = None,
        in_float64: Callable[[], Float[Tensor, "*B n n"]] | None = None,
        *,
        scaled: bool = False,
        symmetric: bool = False,
    ) -> None:
        self.matrix = matrix if symmetric else _symmetrised(matrix)
        self.name = name
        self.rtol = rtol
        self.damping: float | None = None
        self._in_float64 = in_float64
        self._scaled = scaled and rtol is None
        self._eigen: Eigen | None = None
        self._solver: Callable[[Tensor], Tensor] | None = None

    def precise(self) -> Float[Tensor, "*B n n"]:
        """Return the matrix in float64."""
        if self.matrix.dtype == torch.float64 or self._in_float64 is None:
            return self.matrix.double()
        return _symmetrised(self._in_float64())

    @property
    def eigen(self) -> Eigen:
        """The eigendecomposition, negative round-off set to zero."""
        if self._eigen is None:
            decompose([self])
        assert self._eigen is not None
        return self._eigen

    def largest(self) -> float:
        """Return λ_max, of the whole stack; decomposes only matrices whose norm admits it: ‖K‖²/tr K ≤ λ_max ≤ ‖K‖."""
        if self._eigen is not None:
            return float(self._eigen.values.max())
        stack = self.matrix.reshape(-1, *self.matrix.shape[-2:])
        norm = torch.linalg.vector_norm(stack, dim=(1, 2), dtype=torch.float64)
        if not bool(norm.isfinite().all()):
            return float(self.eigen.values.max())
        trace = stack.diagonal(dim1=1, dim2=2).sum(1, dtype=torch.float64)
        bound = torch.where(trace > 0, norm.square() / torch.where(trace > 0, trace, 1), 0).max()
        return max(0.0, float(torch.linalg.eigvalsh(stack[norm >= 0.999 * bound]).max()))

    def solve(self, rhs: Float[Tensor, "*B n K"], damping: float) -> Float[Tensor, "*B n K"]:
        """Return `(K + ρI)⁻¹ rhs`, `K⁺ rhs` for ρ = 0."""
        prepare([self], damping)
        assert self._solver is not None
        return self._solver(rhs)

    def sandwich(
        self,
        left: Float[Tensor, "*B Q n"],
        right: Float[Tensor, "*B R n"],
        damping: float,
        direct: Callable[[], Float[Tensor, "*B Q R"]],
        *,
        summed: bool = False,
    ) -> Float[Tensor, "*C Q R"]:
        """Return `x (SᵀS + ρI)⁻¹ yᵀ` for `SSᵀ` this matrix, or its sum over a stack, whose subtrahend is one product.

        See `Eigen.sandwich`, which does it where Cholesky cannot.
        """
        halves = self._halves(left, right, damping)
        if halves is None:
            found = self.eigen.sandwich(left, right, damping, direct)
            return found.sum(0) if summed else found
        x, y = halves
        products = direct()
        if summed:
            flat = _below_each_other(x)
            x, y, products = flat, flat if x is y else _below_each_other(y), products.sum(0)
        return ((products - x.mT @ y) / damping).to(left)

    def _halves(
        self, left: Float[Tensor, "*B Q n"], right: Float[Tensor, "*B R n"], damping: float
    ) -> tuple[Float[Tensor, "*B n Q"], Float[Tensor, "*B n R"]] | None:
        """Return `L⁻¹Sxᵀ` and `L⁻¹Syᵀ` in float64 for `LLᵀ = K + ρI`, given `xSᵀ` and `ySᵀ`.

        Then `x (SᵀS + ρI)⁻¹ yᵀ` is the difference of `xyᵀ` and their product, over ρ. It cancels to the round-off of
        `xyᵀ` over ρ, as the part outside the span of S does in any form, so a factor in float64 of a matrix in float32
        loses nothing more. None without damping, and, with a warning, if K is too ill-conditioned for its type.
        """
        if damping == 0:
            return None
        factor, failed = _cholesky(self.matrix.double(), damping)
        if not _trusted(factor, failed, self.matrix.dtype):
            self._warn(damping, "by an eigendecomposition")
            return None
        x = _half_solved(factor, left)
        return x, x if left is right else _half_solved(factor, right)

    def _use_cholesky(self, damping: float, factor: Tensor, failed: Tensor) -> bool:
        if not _trusted(factor, failed, factor.dtype):
            return False
        self.damping = damping
        self._solver = partial(_by_cholesky, factor)
        return True

    def _use_scaled(self) -> bool:
        """Solve without damping by `D (D K D)⁻¹ D`, D scaling to a unit diagonal, if the rows that are not zero admit it."""
        if not self._scaled:
            return False
        matrix = self.precise()
        diagonal = matrix.diagonal(dim1=-2, dim2=-1)
        scale = torch.where(diagonal > 0, diagonal.clamp_min(torch.finfo(diagonal.dtype).tiny).rsqrt(), 0)
        unit = scale[..., :, None] * matrix * scale[..., None, :]
        unit.diagonal(dim1=-2, dim2=-1).fill_(1)
        factor, failed = _cholesky(unit, 0.0)
        pivots = factor.diagonal(dim1=-2, dim2=-1)
        limit = 1 / (matrix.shape[-1] * torch.finfo(self.matrix.dtype).eps)
        if bool(failed.any()) or not bool(((pivots.amax(-1) / pivots.amin(-1)).square() < limit).all()):
            return False
        self.damping = 0.0
        self._solver = partial(_by_scaled_cholesky, factor, scale[..., None])
        return True

    def _use_eigen(self, damping: float) -> None:
        self.damping = damping
        self._solver = partial(_by_eigen, self.eigen.vectors, self.eigen.inverse(damping)[..., None])

    def _rescue(self, damping: float) -> None:
        """Solve a system that plain Cholesky could not, and say so."""
        done = "in float64"
        in_float64 = self.matrix.dtype == torch.float64
        if in_float64 or not self._use_cholesky(damping, *_cholesky(self.precise(), damping)):
            done = "by an eigendecomposition"
            self._use_eigen(damping)
        self._warn(damping, done)

    def _warn(self, damping: float, done: str) -> None:
        warnings.warn(
            f"{self.name}: condition number about {self.largest() / damping + 1:.1e} at damping {damping:.1e} is too "
            f"large for Cholesky in {str(self.matrix.dtype).removeprefix('torch.')}; solved {done}.",
            IllConditioned,
            stacklevel=2,
        )


def _by_cholesky(factor: Float[Tensor, "*B n n"], rhs: Float[Tensor, "*B n K"]) -> Float[Tensor, "*B n K"]:
    return torch.cholesky_solve(rhs.to(factor), factor).to(rhs)


def _by_scaled_cholesky(
    factor: Float[Tensor, "*B n n"], scale: Float[Tensor, "*B n 1"], rhs: Float[Tensor, "*B n K"]
) -> Float[Tensor, "*B n K"]:
    solution: Tensor = scale * torch.cholesky_solve(scale * rhs.to(factor), factor)
    return solution.to(rhs)


def _by_eigen(
    vectors: Float[Tensor, "*B n n"], scale: Float[Tensor, "*B n 1"], rhs: Float[Tensor, "*B n K"]
) -> Float[Tensor, "*B n K"]:
    return (vectors @ (scale * (vectors.mT @ rhs.to(scale)))).to(rhs)


def _symmetrised(matrix: Float[Tensor, "*B n n"]) -> Float[Tensor, "*B n n"]:
    return (matrix + matrix.mT).mul_(0.5)


def _half_solved(factor: Float[Tensor, "*B n n"], rows: Float[Tensor, "*B Q n"]) -> Float[Tensor, "*B n Q"]:
    """Return `L⁻¹ rowsᵀ` in float64, in the place of the rows' copy where converting them makes one."""
    converted = rows.double().mT
    out = None if rows.dtype == torch.float64 else converted
    half: Tensor = torch.linalg.solve_triangular(factor, converted, upper=False, out=out)
    return half


def _below_each_other(stack: Float[Tensor, "B n Q"]) -> Float[Tensor, "Bn Q"]:
    """Put matrices below each other; column-major ones, as solves return them, stay so."""
    return stack.permute(2, 0, 1).flatten(1).mT


def _cholesky(matrix: Tensor, damping: float) -> tuple[Tensor, Tensor]:
    """Factorise `matrix + ρI`; ρ is on the diagonal meanwhile, which saves a copy."""
    diagonal = matrix.diagonal(dim1=-2, dim2=-1)
    before = diagonal.clone()
    try:
        diagonal.add_(damping)
        factor, info = torch.linalg.cholesky_ex(matrix)
    finally:
        diagonal.copy_(before)
    return factor, info != 0


def _trusted(factor: Tensor, failed: Tensor, dtype: torch.dtype) -> bool:
    """Whether Cholesky factors exist, of matrices in some type that are well enough conditioned for it."""
    diagonal = factor.diagonal(dim1=-2, dim2=-1)
    condition = (diagonal.amax(-1) / diagonal.amin(-1)).square()
    return not bool(failed.any()) and bool((condition < condition_limit(dtype)).all())


def prepare(systems: Iterable[System], damping: float) -> None:
    """Factorise systems for one damping; those of equal size in one batched call on a GPU, which a CPU would not do faster."""
    waiting = [system for system in systems if system.damping != damping]
    if damping == 0:
        left = [system for system in waiting if not system._use_scaled()]
        decompose(left)
        for system in left:
            system._use_eigen(0.0)
        return
    for group in _by_shape(waiting):
        if len(group) == 1 or group[0].matrix.device.type == "cpu":
            found = [_cholesky(system.matrix, damping) for system in group]
        else:
            found = list(zip(*_cholesky(torch.stack([system.matrix for system in group]), damping), strict=True))
        for system, (factor, failed) in zip(group, found, strict=True):
            if not system._use_cholesky(damping, factor, failed):
                system._rescue(damping)


def decompose(systems: Iterable[System]) -> None:
    """Compute eigendecompositions; those of equal size in one batched call."""
    for group in _by_shape([system for system in systems if system._eigen is None]):
        stack = torch.stack([system.precise() for system in group])
        with naming_overflow(stack, ", ".join(system.name for system in group)):
            values, vectors = torch.linalg.eigh(stack)
        for system, value, vector in zip(group, values, vectors, strict=True):
            null = value <= rank_tolerance(value, system.rtol, value.shape[-1], system.matrix.dtype)
            system._eigen = Eigen(value.clamp_min(0), vector, null)


@contextmanager
def naming_overflow(matrix: Tensor, name: str) -> Iterator[None]:
    """Context of a decomposition that fails if a matrix is not finite.

    Raises:
        FloatingPointError: that says so.
    """
    try:
        yield
    except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
        if bool(matrix.isfinite().all()):
            raise
        raise FloatingPointError(
            f"{name}: inner products of rows overflow, as after a run has diverged. Lower the learning rate or raise the "
            "damping, or scale inputs and targets."
        ) from error


def _by_shape(systems: Iterable[System]) -> list[list[System]]:
    groups: dict[tuple[torch.Size, torch.dtype], list[System]] = defaultdict(list)
    for system in systems:
        groups[system.matrix.shape, system.matrix.dtype].append(system)
    return list(groups.values())
