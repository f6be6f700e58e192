"""The models of the paper in torch, linear or with ReLU, for autodiff and for gradient descent on a whole graph."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from curvlab.nn import Propagation

Loss = Callable[[Tensor], Tensor]
"""Training outputs `[n, C]` to a number."""


class GraphNetwork(nn.Module):
    """The sum over some scales l of W_l h_l, where h_l = act(B_l S h_{l−1}) and h_0 are the features; no biases.

    Args:
        propagation: S.
        widths: of the features and of every h_l.
        outputs: C.
        scales: those with a head.
        activation: after every layer; the identity for the linear model.
        generator: of the layers, N(0, 2/width); heads are zero.
    """

    def __init__(
        self,
        propagation: Propagation,
        widths: Sequence[int],
        outputs: int,
        scales: Iterable[int],
        activation: nn.Module,
        generator: torch.Generator,
    ) -> None:
        super().__init__()
        self.propagation, self.activation = propagation, activation
        self.layers = nn.ParameterList(
            torch.randn(after, before, generator=generator, dtype=torch.float64) * (2 / before) ** 0.5
            for before, after in pairwise(widths)
        )
        self.scales = tuple(scales)
        self.heads = nn.ParameterList(torch.zeros(outputs, widths[scale], dtype=torch.float64) for scale in self.scales)

    def hidden(self, x: Float[Tensor, "N F"]) -> list[Float[Tensor, "N _"]]:
        """Return h_0, …, h_H."""
        found = [x]
        for layer in self.layers:
            found.append(self.activation(self.propagation(found[-1]) @ layer.T))
        return found

    def forward(self, x: Float[Tensor, "N F"]) -> Float[Tensor, "N C"]:
        """Return the outputs of all nodes."""
        hidden = self.hidden(x)
        result: Tensor = sum(hidden[s] @ head.T for s, head in zip(self.scales, self.heads, strict=True))
        return result


def gradients(
    model: GraphNetwork, x: Float[Tensor, "N F"], nodes: Int[Tensor, " n"], loss: Loss
) -> tuple[float, list[Tensor], list[Tensor]]:
    """Return the loss at some nodes and its gradients by autodiff, of the heads and of the layers."""
    value = loss(model(x)[nodes])
    parameters = [*model.heads, *model.layers]
    found = torch.autograd.grad(value, parameters, allow_unused=True)
    filled = [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True)]
    return float(value.detach()), filled[: len(model.heads)], filled[len(model.heads) :]


def descend(
    model: GraphNetwork, x: Float[Tensor, "N F"], nodes: Int[Tensor, " n"], loss: Loss, eta: float, steps: int
) -> list[float]:
    """Train in place by gradient descent on the whole graph; returns the loss before every step and at the end."""
    losses = []
    for _ in range(steps):
        value, heads, layers = gradients(model, x, nodes, loss)
        losses.append(value)
        with torch.no_grad():
            for parameter, gradient in zip((*model.heads, *model.layers), (*heads, *layers), strict=True):
                parameter -= eta * gradient
    with torch.no_grad():
        return [*losses, float(loss(model(x)[nodes]))]
