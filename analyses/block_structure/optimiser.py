"""Adam-mini: Adam with one second moment a block of parameters.

    m ← β₁m + (1 − β₁)g       v_b ← β₂v_b + (1 − β₂) mean over block b of g²       θ ← θ − η m̂/(√v̂_b + ε)

With a block an entry it is Adam. Source: Zhang, Chen, Li et al. 2024, algorithm 1.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from curvlab.rows.parameters import ParameterSpace
from curvlab.spectrum import Partition


class AdamMini(torch.optim.Optimizer):
    """Adam with one second moment a block.

    Args:
        model: All its trainable parameters are optimised.
        partition: Of them, in the order of the flat vector.
        lr: Learning rate η.
        betas: β₁ and β₂.
        eps: ε.
        decay: Decoupled weight decay, as AdamW's.
    """

    def __init__(
        self,
        model: nn.Module,
        partition: Partition,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        decay: float = 0.01,
    ) -> None:
        own = {name: p for name, p in model.named_parameters() if p.requires_grad}
        super().__init__(own.values(), {"lr": lr, "betas": betas, "eps": eps, "decay": decay})
        self.space = ParameterSpace({name: p.shape for name, p in own.items()})
        self.own, self.labels = own, partition.labels.to(next(iter(own.values())).device)
        self.counts = torch.bincount(self.labels, minlength=len(partition))
        self.moments: tuple[Tensor, Tensor] | None = None
        self.taken = 0

    @property
    def numbers(self) -> int:
        """Numbers of its state."""
        return len(self.labels) + len(self.counts)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """Take a step; there is no closure."""
        if closure is not None:
            raise ValueError("AdamMini takes no closure: compute the gradients before the step.")
        group = self.param_groups[0]
        (first, second), eta = group["betas"], group["lr"]
        gradient = self.space.flatten(
            {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in self.own.items()}
        )
        if self.moments is None:
            self.moments = torch.zeros_like(gradient), gradient.new_zeros(len(self.counts))
        m, v = self.moments
        self.taken += 1
        m.lerp_(gradient, 1 - first)
        means = torch.zeros_like(v).index_add_(0, self.labels, gradient.square()) / self.counts
        v.lerp_(means, 1 - second)
        scale = (v / (1 - second**self.taken)).sqrt() + group["eps"]
        move = m / (1 - first**self.taken) / scale[self.labels]
        for name, part in self.space.unflatten(move).items():
            parameter = self.own[name]
            parameter.mul_(1 - eta * group["decay"]).sub_(part, alpha=eta)
