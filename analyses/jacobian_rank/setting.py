"""One network on one problem, with what follows from it at initialisation."""

import logging
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

import curvlab
from analyses.descent import Direction, gradient, outputs
from analyses.initialisation import Initialisation
from curvlab import theory
from curvlab.rows import Rows
from curvlab.spectrum import rank
from curvlab.study import round_off
from curvlab.study.loop import Seen

log = logging.getLogger("curvlab")

BOUND_TOLERANCE = 1e-9
"""Excess of ‖r(k)‖²/‖r(0)‖² over a bound that counts as none."""


@dataclass(frozen=True)
class Inspected:
    """What is known of a network's Jacobian at some parameters.

    Attributes:
        deficiency: Row rank that is missing, as a share of the rows.
        change: ‖J − J(0)‖₂.
        change_frobenius: ‖J − J(0)‖_F.
    """

    deficiency: float
    change: float
    change_frobenius: float


@dataclass(frozen=True, eq=False)
class Setting(Initialisation):
    """A problem with its kernel at initialisation."""

    @cached_property
    def jacobian(self) -> Rows:
        """Rows of J(0)."""
        return curvlab.jacobian(self.problem.model, self.inputs)

    @cached_property
    def gram(self) -> Float[Tensor, "R R"]:
        """G(0) = J(0) J(0)ᵀ, not divided by the number of samples."""
        return self.jacobian.gram()

    @cached_property
    def eigenvalues(self) -> Float[np.ndarray, " R"]:
        """Eigenvalues of G(0), ascending."""
        return np.asarray(torch.linalg.eigvalsh(self.gram).numpy(force=True))

    @property
    def radius(self) -> float:
        """Radius of the ball about the initialisation in which condition 2 asks for a stable Jacobian."""
        return theory.condition_radius(float(self.residual.norm()), float(self.eigenvalues[0]))

    @cached_property
    def full_rank(self) -> bool:
        """Whether J(0) has full row rank, which every theorem assumes; a warning says so if it cannot have it."""
        rows = self.jacobian
        if rows.P < rows.R:
            log.warning(
                "%s has P = %d parameters, fewer than its R = %d rows. The theorems need P >= R; steps use the pseudo-inverse.",
                self.problem.name, rows.P, rows.R,
            )  # fmt: skip
        return rank(rows).full is True

    def see(self, model: nn.Module) -> Seen:
        """Outputs of a network, for the `see` of a `Descent`."""
        return {"outputs": outputs(model, self.inputs).numpy(force=True)}

    def gradient(self) -> Direction:
        """The gradient of the summed loss ½‖u − y‖²."""
        return gradient(lambda model: len(self.inputs) * self.loss(model))

    def inspect(self, rows: Rows) -> Inspected:
        """Compare a Jacobian with that at initialisation, by Gram matrices."""
        gram = rows.gram()
        # Rows show smaller singular values than their Gram matrix does, at the price of another sweep over them.
        missing = 0 if rank(gram).full else rows.R - rank(rows).rank
        cross = rows.gram(self.jacobian)
        difference = gram - cross - cross.T + self.gram
        squares = torch.linalg.eigvalsh((difference + difference.T) / 2).clamp_min(0)
        return Inspected(missing / rows.R, float(squares[-1].sqrt()), float(squares.sum().sqrt()))

    def stability_constant(self, seen: Iterable[Inspected]) -> float:
        """C_emp, the largest of what was seen; J(0) has to have full row rank."""
        return theory.stability_constant(max(one.change for one in seen), float(self.eigenvalues[0]))

    def change_share(self, seen: Iterable[Inspected]) -> float:
        """‖J − J(0)‖_F/‖J(0)‖_F, the largest of what was seen."""
        return max(one.change_frobenius for one in seen) / float(self.gram.trace().sqrt())

    def squared_residuals(self, path: Float[np.ndarray, "T R"]) -> Float[np.ndarray, " T"]:
        """‖r(k)‖² of outputs over time."""
        return np.asarray(np.square(path - self.targets.numpy(force=True)).sum(1))

    def round_off(self, condition: float) -> float:
        """Error of residuals, relative to ‖r(0)‖, up to which an identity holds after a solve of a condition number."""
        scale = max(1.0, float(self.targets.norm() / self.residual.norm()))
        return round_off(len(self.targets), condition * scale, self.targets.dtype)
