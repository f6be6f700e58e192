"""The Hessian by central differences of gradients: Hv ≈ (∇L(θ + δv) − ∇L(θ − δv))/(2δ) with δ = ε‖θ‖/‖v‖."""

import torch
from jaxtyping import Float
from torch import Tensor

from analyses.block_structure.setting import Point
from curvlab.spectrum import Operator


class Differences(Operator):
    """The Hessian of a point by differences of gradients.

    Args:
        point: A network in the floating-point type in which gradients are taken.
        epsilon: ε, the length of a step over that of the parameters.
    """

    def __init__(self, point: Point, epsilon: float) -> None:
        self.point, self.epsilon = point, epsilon
        self.space, self.dtype, self.device = point.space, torch.float64, point.parameters.device
        self._own = {name: p for name, p in point.model.named_parameters() if p.requires_grad}

    def matmat(self, block: Float[Tensor, "K P"]) -> Float[Tensor, "K P"]:
        """Multiply a block of vectors: two gradients each."""
        return torch.stack([self._product(vector) for vector in block])

    def _product(self, vector: Float[Tensor, " P"]) -> Float[Tensor, " P"]:
        length, theta = vector.norm(), self.point.parameters.double()
        if not bool(length > 0):
            return torch.zeros_like(vector)
        move = vector * (self.epsilon * theta.norm() / length)
        difference = self._gradient(theta + move) - self._gradient(theta - move)
        product: Tensor = difference * (length / (2 * self.epsilon * theta.norm()))
        return product

    def _gradient(self, theta: Float[Tensor, " P"]) -> Float[Tensor, " P"]:
        """The gradient at other parameters, rounded to the network's type."""
        kept = next(iter(self._own.values())).dtype
        at = {name: value.to(kept).requires_grad_() for name, value in self.space.unflatten(theta).items()}
        outputs = torch.func.functional_call(self.point.model, at, (self.point.inputs,))
        loss = self.point.loss(outputs, self.point.targets)
        found = torch.autograd.grad(loss, list(at.values()), materialize_grads=True)
        return self.space.flatten(dict(zip(at, found, strict=True))).double()
