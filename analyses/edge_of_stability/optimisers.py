"""What steps, and the operator and threshold that its stability depends on."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from analyses.edge_of_stability.setting import Setting, flat
from curvlab.fisher import Structure
from curvlab.optim import NaturalGradient
from curvlab.rows import sqrt_fisher
from curvlab.spectrum import DiagonalPreconditioner, Operator, Preconditioned, SupportsSolve
from curvlab.theory import sharpness_threshold

BETAS = (0.9, 0.999)
"""Of Adam."""


@dataclass(eq=False)
class Optimiser:
    """An optimiser of torch's, by the curvature of the loss itself.

    Attributes:
        steps: Torch's, with the step size and the state.
        threshold: The largest curvature at which it is stable on a quadratic.
    """

    steps: torch.optim.Optimizer
    threshold: float

    @property
    def eta(self) -> float:
        """The step size."""
        return float(self.steps.param_groups[0]["lr"])

    def curvature(self, hessian: Operator) -> Operator | None:
        """The operator at the present parameters whose largest eigenvalue the threshold is of; here the Hessian.

        None before the first step, where it does not exist yet.
        """
        return hessian

    def step(self) -> None:
        """Take a step by the gradients that the parameters hold."""
        self.steps.step()


@dataclass(eq=False)
class Adam(Optimiser):
    """Adam, by the curvature that its present diagonal preconditions."""

    model: nn.Module

    @property
    def preconditioner(self) -> DiagonalPreconditioner:
        """The diagonal that the last step divided by."""
        return DiagonalPreconditioner.adam(self.model, self.steps)

    def curvature(self, hessian: Operator) -> Operator | None:
        """The preconditioned Hessian, from the first step on."""
        return Preconditioned(hessian, self.preconditioner) if self.steps.state else None


@dataclass(eq=False)
class Natural(Optimiser):
    """`curvlab.optim.NaturalGradient` on the whole training set, by the curvature that its structure preconditions."""

    model: nn.Module
    setting: Setting
    structure: Structure
    damping: float

    def curvature(self, hessian: Operator) -> Operator | None:
        """The Hessian that the structure of the present parameters preconditions."""
        problem = self.setting.problem
        self.structure.update(sqrt_fisher(self.model, problem.loss, *problem.train))
        return Preconditioned(hessian, self.structure, self.damping)

    def step(self) -> None:
        """Take a step."""
        self.steps.step(lambda: self.setting.gradient(self.model)[0])


@dataclass(eq=False)
class Frozen(Optimiser):
    """Steps −η(P + ρI)⁻¹g with a P that stays as it is, by the curvature that it preconditions."""

    model: nn.Module
    preconditioner: SupportsSolve
    damping: float

    def curvature(self, hessian: Operator) -> Operator | None:
        """The preconditioned Hessian."""
        return Preconditioned(hessian, self.preconditioner, self.damping)

    def step(self) -> None:
        """Take a step."""
        gradient = parameters_to_vector([p.grad for p in self.model.parameters() if p.grad is not None])
        move = self.preconditioner.solve(gradient, self.damping)
        assert isinstance(move, Tensor)
        vector_to_parameters(flat(self.model) - self.eta * move, self.model.parameters())


def momentum(model: nn.Module, method: str, eta: float, beta: float = 0.0) -> Optimiser:
    """Gradient descent, heavy ball or Nesterov, all by `torch.optim.SGD`."""
    beta = 0.0 if method == "gd" else beta
    steps = torch.optim.SGD(model.parameters(), lr=eta, momentum=beta, nesterov=method == "nesterov" and beta > 0)
    return Optimiser(steps, sharpness_threshold(method, eta, beta))


def adam(model: nn.Module, eta: float) -> Adam:
    """Adam, its preconditioner renewed at every step.

    Its momentum is an average, m ← βm + (1 − β)g, so that the threshold is heavy ball's over 1 − β (derived).
    """
    steps = torch.optim.Adam(model.parameters(), lr=eta, betas=BETAS)
    return Adam(steps, sharpness_threshold("heavy-ball", eta, BETAS[0]) / (1 - BETAS[0]), model)


def natural(model: nn.Module, setting: Setting, structure: Structure, damping: float, eta: float) -> Natural:
    """Natural gradient: steps −η(F + ρI)⁻¹g with a structure of the exact Fisher, renewed at every step."""
    steps = NaturalGradient(
        model, setting.problem.loss, eta, structure=structure, kind="exact", damping=damping, decay=0.0, kl_clip=None
    )
    return Natural(steps, sharpness_threshold("gd", eta), model, setting, structure, damping)


def frozen(model: nn.Module, preconditioner: SupportsSolve, damping: float, eta: float) -> Frozen:
    """Gradient descent that a preconditioner changes by the same linear map in every step."""
    steps = torch.optim.SGD(model.parameters(), lr=eta)
    return Frozen(steps, sharpness_threshold("gd", eta), model, preconditioner, damping)
