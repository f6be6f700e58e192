"""The models of the paper in torch, linear or with ReLU, for autodiff and for gradient descent on a whole graph."""

from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from analyses.descent import Descent, gradient
from curvlab.nn import Propagation
from curvlab.study.loop import Seen

Loss = Callable[[Tensor], Tensor]
"""Training outputs `[n, C]` to a number."""


class MultiscaleNetwork(nn.Module):
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


def loss_of(name: str, labels: Tensor, classes: int) -> Loss:
    """A loss of the training outputs, summed over nodes; targets are one-hot, the first is the paper's."""
    one_hot = functional.one_hot(labels, classes).double()
    if name == "squared":
        return lambda z: (z - one_hot).square().sum()
    if name == "cross-entropy":
        return lambda z: functional.cross_entropy(z, labels, reduction="sum")
    return lambda z: torch.logaddexp(z - one_hot, one_hot - z).sum()


def gradients(
    model: MultiscaleNetwork, x: Float[Tensor, "N F"], nodes: Int[Tensor, " n"], loss: Loss
) -> tuple[float, list[Tensor], list[Tensor]]:
    """Return the loss at some nodes and its gradients by autodiff, of the heads and of the layers."""
    value = loss(model(x)[nodes])
    parameters = [*model.heads, *model.layers]
    found = list(torch.autograd.grad(value, parameters, materialize_grads=True))
    return float(value.detach()), found[: len(model.heads)], found[len(model.heads) :]


def descent(
    model: MultiscaleNetwork, x: Float[Tensor, "N F"], nodes: Int[Tensor, " n"], loss: Loss, eta: float
) -> Descent:
    """Return gradient descent on the whole graph, on the loss at some nodes, which is seen."""

    def of(model: nn.Module) -> Tensor:
        return loss(model(x)[nodes])

    def see(model: nn.Module) -> Seen:
        with torch.no_grad():
            return {"loss": float(of(model))}

    return Descent(model, gradient(of), eta, see)
