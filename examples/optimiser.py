"""An optimiser that is no natural gradient: the inverse root of a structure, as Adam has one of its diagonal.

    python examples/optimiser.py

The step is θ ← θ − η (F^½ + εI)⁻¹ g, for any structure that has powers.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

import curvlab
from curvlab.fisher import KFAC, Structure
from curvlab.problems import resolve


class InverseRoot(torch.optim.Optimizer):
    """Steps along the gradient, times the inverse root of a running average of the empirical Fisher matrix.

    Args:
        model: whose parameters are trained.
        loss: a loss module.
        structure: an approximation of the Fisher matrix, not updated yet.
        lr: η.
        epsilon: ε, beside the root.
        decay: weight of the curvature so far.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: nn.Module,
        structure: Structure,
        lr: float,
        epsilon: float = 1e-3,
        decay: float = 0.9,
    ) -> None:
        super().__init__(model.parameters(), {"lr": lr, "epsilon": epsilon})
        self.model, self.loss, self.structure, self.decay = model, loss, structure, decay

    def step(self, closure: Callable[[], tuple[Tensor, Tensor]]) -> Tensor:  # type: ignore[override]
        """Take a step on the batch (inputs, targets) that a function returns; returns the loss before it."""
        x, y = closure()
        self.structure.update(curvlab.sqrt_fisher(self.model, self.loss, x, y, kind="empirical"), self.decay)
        self.zero_grad()
        value: Tensor = self.loss(self.model(x), y)
        value.backward()
        (group,) = self.param_groups
        gradient = {name: p.grad for name, p in self.model.named_parameters()}
        step = self.structure.solve(gradient, group["epsilon"], power=0.5, damps="power")
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                parameter.sub_(step[name], alpha=group["lr"])
        return value.detach()


def main() -> None:
    """Train the network of the digits with it."""
    problem = resolve("digits-mlp", seed=0)
    x, y = problem.train
    optimiser = InverseRoot(problem.model, problem.loss, KFAC(), lr=0.02)
    for start in range(0, 1024, 64):
        batch = slice(start, start + 64)
        value = optimiser.step(lambda batch=batch: (x[batch], y[batch]))
        print(f"{start // 64:3d}  {float(value):.3f}")


if __name__ == "__main__":
    main()
