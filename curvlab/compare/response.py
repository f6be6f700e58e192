"""Steps of structures at some weights, and their response in the linearised model.

A step `θ ← θ − η (F + ρI)⁻¹∇L` moves the outputs by the response, `M = S (F + ρI)⁻¹ Sᵀ` in the metric of the loss.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from curvlab.compare.batches import Batch
from curvlab.compare.landscape import Landscape, Weights
from curvlab.fisher import Structure
from curvlab.fisher.damping import Damping, absolute
from curvlab.rows import Rows
from curvlab.rows.passes import Pass


@dataclass(frozen=True, eq=False)
class Linearised:
    """What steps at some weights are made of.

    Attributes:
        rows: S, of which structures are built.
        gradient: g by name.
        coefficients: c with `Sᵀc = g`, None where g need not lie in the range of the rows.
    """

    rows: Rows
    gradient: Weights
    coefficients: Float[Tensor, " R"] | None

    @classmethod
    def at(
        cls, landscape: Landscape, weights: Weights, batch: Batch, how: Pass | None = None, *, lifts: bool = True
    ) -> Linearised:
        """Take rows and gradient at some weights. Cost: a sweep, a forward and a backward pass.

        Args:
            landscape: the loss.
            weights: by name.
            batch: inputs and targets.
            how: which rows; those of the landscape if None.
            lifts: whether coefficients are wanted, which structures that average can do without.
        """
        slope, rows = landscape.slope(weights, batch), landscape.rows(weights, batch, how)
        if rows.root is None or not lifts:
            return cls(rows, slope.gradient, None)
        coefficients = rows.dual(slope.at_outputs.to(rows.dtype))
        spans = _agree(rows, rows.rmatvec(coefficients), slope.gradient)
        return cls(rows, slope.gradient, coefficients if spans else None)

    def step(self, structure: Structure, damping: Damping) -> Weights:
        """Return `(F + ρI)⁻¹g` of an updated structure, by `lift` where that keeps its digits at any damping."""
        if self.coefficients is not None and structure.rows is self.rows:
            return structure.lift(self.coefficients, damping)
        return structure.direction(self.gradient, damping)


@dataclass(frozen=True)
class Response:
    """What a structure does to the outputs of the linearised model; attributes are columns of the table of `compare`."""

    rho: float
    rho_rel: float
    alpha: float
    anisotropy: float
    cosine: float
    lambda_max: float

    @property
    def eta_linear(self) -> float:
        """2/λ_max: below it the first step is stable in the linearised model."""
        return 2 / self.lambda_max


def response_of(
    structure: Structure,
    damping: Damping,
    exact: Rows,
    projector: Float[Tensor, "R R"],
    step: Weights,
    wanted: Weights,
) -> Response:
    """Look at the response of a structure.

    Args:
        structure: with the rows of the batch.
        damping: ρ, absolute or relative.
        exact: exact rows of the batch.
        projector: see `projector_of`.
        step: of the structure.
        wanted: of the full exact matrix.

    Cost: `Structure.response`, and the eigenvalues of an `[R, R]` matrix.
    """
    rho = absolute(damping, structure.largest_eigenvalue)
    response = structure.response(exact, damping) * structure.count
    response = (response + response.T) / 2
    alpha = float(response.trace() / projector.trace())
    return Response(
        rho=rho,
        rho_rel=rho / structure.largest_eigenvalue(),
        alpha=alpha,
        anisotropy=float((response - alpha * projector).norm() / (alpha * projector).norm()),
        cosine=_cosine(exact, step, wanted),
        lambda_max=float(torch.linalg.eigvalsh(response).max()),
    )


def projector_of(exact: Rows) -> Float[Tensor, "R R"]:
    """Return the projector on the rows' directions that the loss weighs."""
    assert exact.root is not None
    within = exact.root.projector()
    V, N, _ = within.shape
    out = within.new_zeros(V, N, V, N)
    n = torch.arange(N, device=within.device)
    out[:, n, :, n] = within.transpose(0, 1)
    return out.view(V * N, V * N)


def slope_along(linearised: Linearised, direction: Weights) -> float:
    """Return g·d."""
    return float(sum((g.double() * direction[name].double()).sum() for name, g in linearised.gradient.items()))


def curvature_along(exact: Rows, direction: Weights) -> float:
    """Return `dᵀGd`, G the generalised Gauss-Newton matrix of the batch."""
    return float(exact.matvec({name: d.to(exact.dtype) for name, d in direction.items()}).square().sum())


def _agree(rows: Rows, a: Weights, b: Weights) -> bool:
    """Whether two vectors agree to half of the digits: the gradient, and what rows that may lack some of it make of it."""
    x, y = rows.space.flatten(a), rows.space.flatten(b)
    return bool((x - y).norm() <= torch.finfo(rows.dtype).eps ** 0.5 * y.norm())


def _cosine(rows: Rows, a: Weights, b: Weights) -> float:
    """Return the cosine of two vectors, which rounding does not carry above 1."""
    x, y = (rows.space.flatten(v).double() for v in (a, b))
    return max(-1.0, min(1.0, float(x @ y / (x.norm() * y.norm()))))
