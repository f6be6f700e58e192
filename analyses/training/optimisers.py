"""Optimisers that a run can take: what it asks of one, and those that are made of others."""

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from curvlab.optim import NaturalGradient


class Closure(Protocol):
    """Runs a forward and a backward pass on a batch and returns the loss."""

    def __call__(self, scaler: torch.amp.GradScaler | None = None) -> Tensor:
        """With a scaler, the forward pass is under autocast and gradients are scaled."""


class Optimiser(Protocol):
    """What a run asks of an optimiser."""

    @property
    def step(self) -> Callable[..., Any]:
        """What takes a step, given a closure for each batch of the step, and returns their mean loss."""

    def state_dict(self) -> dict[str, Any]:
        """Return what continues the run."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue a run."""


class Together:
    """Optimisers that share the parameters of a model out among them."""

    def __init__(self, *optimisers: torch.optim.Optimizer) -> None:
        self.optimisers = optimisers

    def step(self, closure: Closure) -> Tensor:
        """Run the closure once, then step each."""
        loss = closure()
        for optimiser in self.optimisers:
            optimiser.step()
        return loss

    def state_dict(self) -> dict[str, Any]:
        """Return all states."""
        return {str(index): optimiser.state_dict() for index, optimiser in enumerate(self.optimisers)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore all states."""
        for index, optimiser in enumerate(self.optimisers):
            optimiser.load_state_dict(state_dict[str(index)])


class Accumulating:
    """Natural gradient on several passes a step: gradients and curvature are means over all of them."""

    def __init__(self, optimiser: NaturalGradient) -> None:
        self.optimiser = optimiser
        self.state_dict, self.load_state_dict = optimiser.state_dict, optimiser.load_state_dict

    def step(self, *closures: Closure) -> Tensor:
        """Collect from every pass, then step."""
        losses = []
        for closure in closures:
            with self.optimiser.collect():
                losses.append(closure().detach())
        for parameter in self.optimiser.preconditioner.model.parameters():
            if parameter.grad is not None:
                parameter.grad /= len(closures)
        self.optimiser.step()
        return torch.stack(losses).mean()


class MixedPrecision:
    """Natural gradient from a forward pass under autocast, with a scaled loss."""

    def __init__(self, optimiser: NaturalGradient) -> None:
        self.optimiser = optimiser
        self.scaler = torch.amp.GradScaler(next(optimiser.preconditioner.model.parameters()).device.type)

    def step(self, closure: Closure) -> Tensor:
        """Collect from the pass; the step is skipped where gradients overflow, and the scale lowered."""
        with self.optimiser.collect():
            loss = closure(self.scaler)
        self.scaler.step(self.optimiser)
        self.scaler.update()
        return loss

    def state_dict(self) -> dict[str, Any]:
        """Return the states of optimiser and scaler."""
        return {"optimiser": self.optimiser.state_dict(), "scaler": self.scaler.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore both."""
        self.optimiser.load_state_dict(state_dict["optimiser"])
        self.scaler.load_state_dict(state_dict["scaler"])
