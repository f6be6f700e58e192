"""What the rows of single samples say: gradient noise, the response of outputs to a step, and the rank of the kernel."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from curvlab.errors import UnsupportedModel
from curvlab.fisher import Structure
from curvlab.monitor.quantity import Quantity
from curvlab.monitor.stepping import Stepping
from curvlab.monitor.training import Training
from curvlab.rows import Rows

MOST_ROWS = 2048
"""Rows of a Gram matrix at most."""
ROWS_AT_ONCE = 16
"""Rows that are preconditioned at once, as dense vectors."""


class Noise(Quantity, key="noise", summary="gradient noise scale tr Σ / ‖g‖² of the batch, in samples"):
    """The gradient noise scale: how large a batch has to be for its gradient to stand out of the noise.

    With h_n the gradient of the mean loss of sample n, Σ is the covariance of h over samples and g its mean. Both are estimated
    without bias: tr Σ from N − 1, and ‖g‖² as ‖mean h‖² − tr Σ/N, which noise can make negative; the scale is not given then.

    Source: McCandlish et al. 2018, An empirical model of large-batch training (its simple noise scale).
    """

    passes = 6.0

    def measure(self, training: Training) -> dict[str, float]:
        """Return tr Σ, ‖g‖² and their ratio."""
        rows = training.rows("empirical")
        N = rows.R  # one a sample
        if N < 2:
            raise UnsupportedModel(f"The noise is the spread over samples, and the batch has {N}. Use larger batches.")
        products = N**2 / rows.count * rows.gram()  # of h_n = N·∇ℓ_n/count, rows being ∇ℓ_n/√count
        square, mean = float(products.diagonal().mean()), float(products.mean())
        noise = (square - mean) * N / (N - 1)
        signal = mean - noise / N
        found = {"trace": noise, "gradient_square": signal}
        return found | {"scale": noise / signal} if signal > 0 else found


class _OfKernel(Quantity):
    """A quantity of exact rows.

    Args:
        samples: of the batch, the first so many, at most.
    """

    passes = 12.0

    def __init__(self, samples: int = 16) -> None:
        if samples < 1:
            raise ValueError(f"samples must be at least 1, got {samples}.")
        self.samples = samples

    def rows(self, training: Training) -> Rows:
        """Return exact rows, not too many."""
        rows = training.rows("ggn", self.samples)
        if rows.R > MOST_ROWS:
            raise UnsupportedModel(
                f"{rows.shape[1]} samples have {rows.R} rows, more than {MOST_ROWS}: each has {rows.shape[0]} outputs. Use fewer "
                f"samples: {type(self).__name__}(samples=1)."
            )
        return rows


class EffectiveRank(_OfKernel, key="rank", summary="effective rank of the Gram matrix S Sᵀ of the first samples"):
    """The effective rank exp(−Σ p log p) with p the eigenvalues of S Sᵀ over their sum: between 1 and the number of rows.

    Source: Roy & Vetterli 2007, The effective rank: a measure of effective dimensionality.
    """

    def measure(self, training: Training) -> dict[str, float]:
        """Return the effective rank, and the number of rows."""
        rows = self.rows(training)
        values = torch.linalg.eigvalsh(rows.gram().double()).clamp_min(0)
        if not float(values.sum()) > 0:
            return {"effective": 0.0, "rows": float(rows.R)}
        shares = values / values.sum()
        entropy = -torch.special.xlogy(shares, shares).sum()
        return {"effective": float(entropy.exp()), "rows": float(rows.R)}


class Anisotropy(_OfKernel, key="anisotropy", summary="how unlike the outputs answer a step: 0 if all answer alike"):
    """How unlike the outputs answer a step of the optimiser: M = S P⁻¹ Sᵀ, as in `curvlab.compare`.

    With Q the projector on the directions that the loss weighs and α = tr M/tr Q, the anisotropy is ‖M − αQ‖/‖αQ‖. M lies
    within the range of Q, so ‖M − αQ‖² = ‖M‖² − α² tr Q.
    """

    of_optimizer = True

    def measure(self, training: Training) -> dict[str, float]:
        """Return α and the anisotropy."""
        rows = self.rows(training)
        assert rows.root is not None
        response = _response(rows, training.stepping())
        weighed = float(rows.root.projector().diagonal(dim1=0, dim2=2).sum())
        alpha = float(response.trace()) / weighed
        if not alpha > 0:
            return {"alpha": alpha}
        excess = float(response.square().sum()) / (alpha**2 * weighed) - 1
        return {"alpha": alpha, "anisotropy": max(excess, 0.0) ** 0.5}


def _response(rows: Rows, stepping: Stepping) -> Float[Tensor, "R R"]:
    """Return S P⁻¹ Sᵀ."""
    structure = stepping.preconditioner
    if structure is None:
        return rows.gram()
    if isinstance(structure, Structure):
        return structure.response(rows, stepping.damping) * structure.count
    unit = torch.eye(rows.R, dtype=rows.dtype, device=rows.device)
    return torch.cat(
        [rows.matvec(stepping.solve(rows.space.flatten(rows.rmatvec(part)))) for part in unit.split(ROWS_AT_ONCE)]
    )
