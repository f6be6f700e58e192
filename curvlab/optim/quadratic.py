"""The quadratic model of the loss on one batch, and what is read off it.

    M(δ) = L(θ) + gᵀδ + ½ δᵀ(F + ρI)δ

with F the exact Fisher matrix of the batch, from Jacobian-vector products: K directions cost K forward passes in forward
mode, whatever structure made the directions.

Source: Martens & Grosse 2015, sections 6.4 (step size), 6.5 (damping) and 7 (momentum).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from math import isfinite, nan
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import jvp

from curvlab.errors import UnsupportedModel
from curvlab.nn.functional import called_with
from curvlab.nn.linearize import differentiable_attention
from curvlab.nn.modes import RandomState, replayed
from curvlab.optim.hyper import Hyper, whole
from curvlab.rows.loss import flat_outputs, loss_terms
from curvlab.rows.parameters import Parameters
from curvlab.rows.processes import mean_of_processes
from curvlab.rows.sweep import Arguments, PickOutput, select_output

SHARE = 0.01
"""Of the curvature along the first gradient that the damping has at first."""


@dataclass(frozen=True)
class BatchLoss:
    """The loss of a model on the batch of one pass, its mean over processes; evaluating it changes no buffer of the model.

    Attributes:
        direct: whether the loss was called on what the model returned.
        shape: in which it was, if not that of what the model returned.
        random: what random numbers the pass drew from, which every evaluation draws anew, so that dropout is the same.
        pick: which tensor of a structured output the loss is called on.
        decay: λ of `½ λ‖θ‖²` that parameters, by name, add to the loss.
    """

    model: nn.Module
    loss: nn.Module
    arguments: Arguments
    targets: Any
    direct: bool = True
    shape: Sequence[int] | None = None
    random: RandomState = field(default_factory=dict)
    pick: PickOutput = None
    decay: Mapping[str, float] = field(default_factory=dict)

    def outputs(self, parameters: Parameters) -> Tensor:
        """Run the model at other parameters.

        Raises:
            UnsupportedModel: if the loss was called on something else than what the model returned.
        """
        if not self.direct:
            raise UnsupportedModel(
                "The loss was called on something else than what the model returned. The quadratic model evaluates the loss on "
                "what the model returns, perhaps flattened: let the model pick, scale and transpose its output, or say how the "
                "optimiser does so, as in output='logits' or output=lambda heads: torch.cat(heads, 1)."
            )
        args, kwargs = self.arguments
        buffers = {name: buffer.clone() for name, buffer in self.model.named_buffers()}
        with replayed(self.random):
            returned = called_with(self.model, {**buffers, **parameters}, args, kwargs)
        z: Tensor = returned if self.pick is None else select_output(returned, self.pick)
        z = z if self.shape is None else z.reshape(tuple(self.shape))
        # A step changes the loss by less than the round-off of half precision.
        return z.to(torch.promote_types(z.dtype, torch.float32))

    def value(self, parameters: Parameters) -> float:
        """Return the loss at other parameters."""
        with torch.no_grad():
            decay = sum(weight / 2 * float(parameters[name].square().sum()) for name, weight in self.decay.items())
            return float(mean_of_processes(self.loss(self.outputs(parameters), self.targets))) + decay

    def _moved(self, here: Parameters, moving: Parameters) -> Tensor:
        return self.outputs({**here, **moving})

    def curvature(self, directions: Sequence[Parameters], at: Parameters | None = None) -> Float[Tensor, "K K"]:
        """Return `δ_kᵀ (F + λI) δ_l`, at the model's own parameters if `at` is None; those without a direction stay fixed."""
        weighted = []
        here = {name: p.detach() for name, p in self.model.named_parameters()} | dict(at or {})
        for direction in directions:
            moving = {name: here[name] for name in direction}
            with torch.no_grad(), differentiable_attention():
                z, u = jvp(partial(self._moved, here), (moving,), (dict(direction),))[:2]
            root = loss_terms(self.loss, z, self.targets).root()
            weighted.append(root.apply(flat_outputs(u).permute(1, 2, 0).flatten(0, 1)).flatten())
        stacked = torch.stack(weighted)
        products = mean_of_processes(stacked @ stacked.T)
        for name, weight in self.decay.items():
            if name in directions[0]:
                moved = torch.stack([direction[name].flatten() for direction in directions])
                products = products + weight * (moved @ moved.T)
        return products


def best_combination(
    batch: BatchLoss, gradient: Parameters, directions: Sequence[Parameters], damping: float
) -> tuple[Float[Tensor, " K"], Float[Tensor, ""]]:
    """Return the coefficients c that minimise `M(Σ_k c_k δ_k)`, and the step's squared length in the metric of F + ρI.

    Where M is flat, they are the smallest ones.
    """
    names = list(directions[0])
    products = torch.stack([torch.stack([inner(a, b, names) for b in directions]) for a in directions])
    slopes = torch.stack([inner(gradient, direction, names) for direction in directions])
    matrix = batch.curvature(directions) + damping * products
    best: Tensor = -torch.linalg.pinv(matrix.double(), hermitian=True) @ slopes.double()
    return best, best @ matrix.double() @ best


@dataclass(frozen=True)
class Agreement:
    """How the loss of a batch has changed over a step.

    Attributes:
        decrease: of the loss.
        promised: `M(0) − M(δ)`.
        round_off: of the decrease.
    """

    decrease: float
    promised: float
    round_off: float

    @property
    def ratio(self) -> float:
        """The decrease over the promised one; not a number if none was promised."""
        return self.decrease / self.promised if self.promised > 0 else nan


def agreement(
    batch: BatchLoss, gradient: Parameters, before: Parameters, after: Parameters, damping: float
) -> Agreement:
    """Return how the loss has changed, and should have."""
    step = {name: after[name] - before[name] for name in gradient}
    squared = batch.curvature([step], at=before)[0, 0] + damping * inner(step, step, list(step))
    promised = -float(inner(gradient, step, list(step)) + squared / 2)
    start = batch.value(before)
    eps = torch.finfo(next(iter(before.values())).dtype).eps
    return Agreement(start - batch.value(after), promised, 10 * eps * max(1.0, abs(start)))


def inner(left: Parameters, right: Parameters, names: Sequence[str]) -> Tensor:
    """Return the inner product over some parameters."""
    return torch.stack([(left[name] * right[name]).sum() for name in names]).sum()


@dataclass(frozen=True)
class LevenbergMarquardt:
    """Damping that follows how well the quadratic model predicts the loss.

    Every `every` steps, with r the decrease of the batch's loss over the promised one: `ρ ← ωᵏρ` if r > 3/4, `ρ ← ρ/ωᵏ`
    if r < 1/4, with k = `every`. The promise follows the gradient, so call `backward()` on the loss itself and no multiple; a
    GradScaler's factor is known. Dropout is the same in all evaluations of a batch.

    Args:
        initial: ρ at the start; if None, a share of the curvature along the first gradient, `0.01 gᵀFg/gᵀg`, which follows
            whatever the loss and the inputs are multiplied by.
        omega: ω in (0, 1).
        every: steps between adjustments; each costs two forward passes and a Jacobian-vector product.
        low: smallest ρ.
        high: largest ρ.

    Source: Martens & Grosse 2015, section 6.5 (ω = 19/20, k = 5).
    """

    initial: float | None = None
    omega: float = 0.95
    every: int = 5
    low: float = 1e-8
    high: float = 1e4

    def __post_init__(self) -> None:
        Hyper("omega", self.omega, high=1.0, open_low=True).at(0)
        if self.initial is not None:
            Hyper("initial", self.initial, low=self.low, high=self.high).at(0)
        whole("every", self.every)

    def first(self, curvature: float) -> float:
        """Return ρ at the start for a curvature gᵀFg/gᵀg; not a number counts as none."""
        found = SHARE * curvature if self.initial is None else self.initial
        return min(self.high, max(self.low, found)) if isfinite(found) else self.low

    def adjusted(self, damping: float, seen: Agreement) -> float:
        """Return the next ρ; a step of which no decrease was promised has failed, one that is lost in round-off says nothing."""
        if abs(seen.promised) <= seen.round_off:
            return damping
        ratio, shrinkage = seen.ratio, self.omega**self.every
        if ratio > 0.75:
            return max(self.low, damping * shrinkage)
        return damping if ratio >= 0.25 else min(self.high, damping / shrinkage)
