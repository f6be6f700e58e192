"""Steps of a network's parameters, θ ← θ − η d(θ): directions, and the process that takes them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from curvlab.study.loop import Seen

Direction = Callable[[nn.Module], Mapping[str, Tensor]]
"""What a step subtracts η times, at the parameters that a network has, by their names."""


def flat(z: Float[Tensor, "N C"]) -> Float[Tensor, " R"]:
    """Outputs in row order (output, sample), outputs outermost."""
    return z.T.reshape(-1)


def outputs(model: nn.Module, inputs: Tensor) -> Float[Tensor, " R"]:
    """Outputs of a model in row order."""
    with torch.no_grad():
        return flat(model(inputs))


def gradient(loss: Callable[[nn.Module], Tensor]) -> Direction:
    """Return the gradient of a function of the network, zero for parameters that it does not use."""

    def direction(model: nn.Module) -> Mapping[str, Tensor]:
        parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        found = torch.autograd.grad(loss(model), list(parameters.values()), materialize_grads=True)
        return dict(zip(parameters, found, strict=True))

    return direction


def move(model: nn.Module, step: Mapping[str, Tensor], eta: float) -> None:
    """Take the step `θ ← θ − η step`; parameters that it does not name stay."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in step:
                parameter.sub_(eta * step[name])


def length(step: Mapping[str, Tensor]) -> float:
    """Norm of a step of the parameters."""
    return float(torch.stack([part.square().sum() for part in step.values()]).sum().sqrt())


@dataclass(eq=False)
class Descent:
    """Steps of a network, for `curvlab.study.follow`.

    Attributes:
        model: Is trained.
        direction: Gives the steps.
        eta: Learning rate η.
        see: What is seen of the network before every step and after the last.
    """

    model: nn.Module
    direction: Direction
    eta: float
    see: Callable[[nn.Module], Seen]

    def look(self, step: int) -> dict[str, Any]:  # noqa: ARG002
        """See the network."""
        return dict(self.see(self.model))

    def step(self, step: int) -> dict[str, Any] | None:  # noqa: ARG002
        """Take a step."""
        move(self.model, self.direction(self.model), self.eta)
        return None

    def state_dict(self) -> dict[str, Any]:
        """The parameters, on which alone the next step depends."""
        return self.model.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up parameters."""
        self.model.load_state_dict(state)
