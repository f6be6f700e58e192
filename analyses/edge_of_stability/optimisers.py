"""What steps, and the operator and threshold that its stability depends on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.utils import vector_to_parameters

from analyses.edge_of_stability.setting import Setting, flat
from curvlab.fisher import Structure
from curvlab.optim import NaturalGradient
from curvlab.spectrum import DiagonalPreconditioner, Operator, Preconditioned, Preconditioner
from curvlab.theory import sharpness_threshold

BETAS = (0.9, 0.999)
"""Of Adam."""


class Steps(Protocol):
    """The two verbs of `torch.optim.Optimizer` that a run needs, and its state."""

    def step(self) -> Any:
        """Take a step by the gradients that the parameters hold."""

    def state_dict(self) -> dict[str, Any]:
        """Return the state."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore it."""


@dataclass(frozen=True)
class Optimiser:
    """An optimiser on a model.

    Attributes:
        steps: what steps.
        threshold: largest curvature at which it is stable on a quadratic.
        curvature: makes of the Hessian the operator whose largest eigenvalue that is to be compared with; None before the
            first step, where it does not exist yet.
    """

    steps: Steps
    threshold: float
    curvature: Callable[[Operator], Operator | None]


def momentum(model: nn.Module, method: str, eta: float, beta: float) -> Optimiser:
    """Gradient descent, heavy ball or Nesterov, all by `torch.optim.SGD`."""
    beta = 0.0 if method == "gd" else beta
    steps = torch.optim.SGD(model.parameters(), lr=eta, momentum=beta, nesterov=method == "nesterov" and beta > 0)
    return Optimiser(steps, sharpness_threshold(method, eta, beta), lambda hessian: hessian)


def adam(model: nn.Module, eta: float) -> Optimiser:
    """Adam, its preconditioner renewed at every step.

    Its momentum is an average, m ← βm + (1 − β)g, so that the threshold is heavy ball's over 1 − β (derived).
    """
    steps = torch.optim.Adam(model.parameters(), lr=eta, betas=BETAS)

    def curvature(hessian: Operator) -> Operator | None:
        return Preconditioned(hessian, DiagonalPreconditioner.adam(model, steps)) if steps.state else None

    return Optimiser(steps, sharpness_threshold("heavy-ball", eta, BETAS[0]) / (1 - BETAS[0]), curvature)


def frozen(model: nn.Module, preconditioner: Preconditioner, damping: float, eta: float) -> Optimiser:
    """Steps −η(P + ρI)⁻¹g with a P that stays as it is."""
    steps = _Frozen(model, preconditioner, damping, eta)
    return Optimiser(steps, sharpness_threshold("gd", eta), lambda h: Preconditioned(h, preconditioner, damping))


def natural(model: nn.Module, setting: Setting, structure: Structure, damping: float, eta: float) -> Optimiser:
    """Natural gradient: steps −η(F + ρI)⁻¹g with a structure of the exact Fisher, renewed at every step."""
    steps = _Natural(model, setting, structure, damping, eta)
    return Optimiser(steps, sharpness_threshold("gd", eta), lambda h: Preconditioned(h, structure, damping))


class _Natural:
    """`curvlab.optim.NaturalGradient` on the whole training set."""

    def __init__(self, model: nn.Module, setting: Setting, structure: Structure, damping: float, eta: float) -> None:
        self.model, self.setting = model, setting
        self.steps = NaturalGradient(
            model, setting.problem.loss, eta, structure=structure, kind="exact", damping=damping, decay=0.0
        )

    def step(self) -> None:
        """Take a step."""
        self.steps.step(lambda: self.setting.gradient(self.model)[0])

    def state_dict(self) -> dict[str, Any]:
        """Return the state."""
        return self.steps.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore it."""
        self.steps.load_state_dict(state_dict)


class _Frozen:
    """Preconditioned gradient descent without momentum."""

    def __init__(self, model: nn.Module, preconditioner: Preconditioner, damping: float, eta: float) -> None:
        self.model, self.preconditioner, self.damping, self.eta = model, preconditioner, damping, eta

    def step(self) -> None:
        """Take a step by the gradients that the parameters hold."""
        gradient: Float[Tensor, " P"] = torch.cat(
            [p.grad.flatten() for p in self.model.parameters() if p.grad is not None]
        )
        move = self.preconditioner.solve(gradient, self.damping)
        assert isinstance(move, Tensor)
        vector_to_parameters(flat(self.model) - self.eta * move, self.model.parameters())

    def state_dict(self) -> dict[str, Any]:
        """There is no state: the preconditioner follows from the run's beginning or from its parameters."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Nothing to restore."""
