"""Preconditioned operators: the pencil (H, F + ρI), and what preconditions."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from curvlab.errors import OutsideRange
from curvlab.fisher.damping import Damping, absolute
from curvlab.fisher.reading import parts_of, second_moment
from curvlab.fisher.structure import Structure
from curvlab.rows.parameters import ParameterSpace, Vector
from curvlab.spectrum.operator import Operator, check_operator
from curvlab.tools.shown import line


@runtime_checkable
class SupportsSolve(Protocol):
    """What preconditions: every structure of `curvlab.fisher`, `DiagonalPreconditioner`, and whatever has these verbs.

    For a relative damping it needs `largest_eigenvalue()`, too.
    """

    def matvec(self, vector: Vector) -> Vector:
        """Return `F v` for a block of flat vectors."""

    def solve(self, vector: Vector, damping: float) -> Vector:
        """Return `(F + ρI)⁻¹ v`, or `F⁺ v` for ρ = 0."""


class StructureOperator(Operator):
    """A structure's matrix F as an operator."""

    def __init__(self, structure: Structure) -> None:
        self.structure = structure
        self.space, self.dtype, self.device = structure.space, structure.dtype, structure.device

    def matmat(self, block: Float[Tensor, "K P"]) -> Float[Tensor, "K P"]:  # noqa: D102
        return _flat(self.structure.matvec(block))


class DiagonalPreconditioner:
    """A diagonal matrix that preconditions.

    Args:
        diagonal: its entries by parameter name, at least 0.

    Raises:
        ValueError: for an entry that is negative or not finite.
    """

    def __init__(self, diagonal: Mapping[str, Tensor]) -> None:
        if not isinstance(diagonal, Mapping):
            raise ValueError(
                f"The diagonal is a mapping by parameter name, got a {type(diagonal).__name__}: {{name: values, …}}, in the shapes "
                "of the parameters."
            )
        self.space = ParameterSpace({name: value.shape for name, value in diagonal.items()})
        self.diagonal: Float[Tensor, " P"] = self.space.flatten(diagonal)
        for name, value in diagonal.items():
            if not bool(((value >= 0) & value.isfinite()).all()):
                raise ValueError(f"The diagonal of {name!r} has an entry that is negative or not finite.")

    def __repr__(self) -> str:
        return line(self, P=self.space.size, diagonal=self.diagonal)

    @classmethod
    def adam(cls, model: nn.Module, optimizer: torch.optim.Optimizer) -> DiagonalPreconditioner:
        """Return `diag(√v̂ + ε)` of a `torch.optim.Adam`, AdamW included: its steps are `−η P⁻¹ m̂`.

        Raises:
            UnsupportedModel: for a trainable parameter that it does not move or has no second moment of, as before its first step.

        Source: Kingma & Ba 2015, algorithm 1; v̂ is the running second moment with its bias corrected.
        """
        parts = parts_of(optimizer, model)
        return cls({part.name: second_moment(part).sqrt() + part.group["eps"] for part in parts})

    def matvec(self, vector: Vector) -> Vector:
        """Return `D v`."""
        return self._scaled(vector, self.diagonal)

    def solve(self, vector: Vector, damping: Damping) -> Vector:
        """Return `(D + ρI)⁻¹ v`; for ρ = 0, zero where D is."""
        shifted = self.diagonal + absolute(damping, self.largest_eigenvalue)
        return self._scaled(vector, torch.where(shifted > 0, 1 / torch.where(shifted > 0, shifted, 1), 0))

    def largest_eigenvalue(self) -> float:
        """Return the largest entry."""
        return float(self.diagonal.max())

    def _scaled(self, vector: Vector, scale: Float[Tensor, " P"]) -> Vector:
        named, restore = self.space.unpack(vector)
        return restore(self.space.unflatten(self.space.flatten(named) * scale))


class Preconditioned(Operator):
    """`(F + ρI)⁻¹H`, symmetric in the inner product of `M = F + ρI`; its eigenvalues are those of the pencil (H, M).

    At ρ = 0 it is `F⁺H` on range(F), in the inner product of F: the eigenvalues of `F^{+1/2} H F^{+1/2}` there.

    Args:
        operator: H, symmetric in the Euclidean inner product.
        preconditioner: F, positive semi-definite.
        damping: ρ, absolute or relative to λ_max(F).

    Raises:
        ValueError: if H is itself preconditioned, if the parameters differ, and for a relative damping of a
            preconditioner without `largest_eigenvalue`.

    Cost of a product: one with H and one solve; of the inner product: one product with F.
    """

    euclidean = False

    def __init__(self, operator: Operator, preconditioner: SupportsSolve, damping: Damping = 0.0) -> None:
        check_operator(operator)
        if not operator.euclidean:
            raise ValueError(
                f"{operator!r} is not symmetric in the Euclidean inner product: precondition it once only."
            )
        if not (hasattr(preconditioner, "matvec") and hasattr(preconditioner, "solve")):
            raise ValueError(
                f"The preconditioner has matvec and solve, as a structure with rows such as KFAC().update(rows), got a "
                f"{type(preconditioner).__name__}."
            )
        space = getattr(preconditioner, "space", operator.space)
        if dict(space.shapes) != dict(operator.space.shapes):
            raise ValueError(
                f"The preconditioner has the parameters {', '.join(space.shapes)}, the operator "
                f"{', '.join(operator.space.shapes)}. Restrict both to the same ones."
            )
        if isinstance(damping, str) and not hasattr(preconditioner, "largest_eigenvalue"):
            raise ValueError(
                f"damping={damping!r} refers to the largest eigenvalue of the preconditioner, but "
                f"{type(preconditioner).__name__} has no largest_eigenvalue(). Pass a number."
            )
        self.operator, self.preconditioner = operator, preconditioner
        self.damping = absolute(damping, lambda: float(preconditioner.largest_eigenvalue()))  # type: ignore[attr-defined]
        self.space, self.dtype, self.device = operator.space, operator.dtype, operator.device

    def matmat(self, block: Float[Tensor, "K P"]) -> Float[Tensor, "K P"]:  # noqa: D102
        return self._solve(self.operator.matmat(block))

    def adjoint(self, block: Float[Tensor, "K P"]) -> Float[Tensor, "K P"]:
        """Multiply with `H(F + ρI)⁻¹`, for ρ = 0 with `H F⁺`."""
        return self.operator.matmat(self._solve(block))

    def held(self) -> AbstractContextManager[None]:  # noqa: D102
        return self.operator.held()

    def metric(self, block: Float[Tensor, "K P"]) -> Float[Tensor, "K P"]:  # noqa: D102
        return _flat(self.preconditioner.matvec(block)) + self.damping * block

    def project(self, block: Float[Tensor, "K P"]) -> Float[Tensor, "K P"]:  # noqa: D102
        return block if self.damping else self._solve(_flat(self.preconditioner.matvec(block)))

    def _solve(self, block: Float[Tensor, "K P"]) -> Float[Tensor, "K P"]:
        with warnings.catch_warnings():
            # What lies outside range(F) has no part in the pencil.
            warnings.simplefilter("ignore", OutsideRange)
            return _flat(self.preconditioner.solve(block, self.damping))


def _flat(vector: Vector) -> Tensor:
    assert isinstance(vector, Tensor)
    return vector
