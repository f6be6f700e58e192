"""Real parameter steps, and what is followed along them: outputs, the kernel, the change of the Jacobian."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import TypeVar

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

import curvlab
from analyses.jacobian_rank.setting import Setting, outputs
from curvlab.fisher import Structure, natural_gradient_step
from curvlab.rows import Rows
from curvlab.spectrum import rank

Direction = Callable[[nn.Module], Mapping[str, Tensor]]
"""Step directions at the present parameters; a step subtracts η times one."""

Look = TypeVar("Look")

UNITS = 64
"""Units whose blocks are looked at one by one."""
DIVERGED = 1e3
"""Residual, relative to the first, above which a run counts as diverged."""
FLOOR = 1e-6
"""Residual, relative to the first, below which round-off and not the rate decides."""


@dataclass(frozen=True)
class Point:
    """What is known of a network's Jacobian at some parameters.

    Attributes:
        deficiency: Row rank that is missing, as a share of the rows.
        change: ‖J − J(0)‖₂.
        change_frobenius: ‖J − J(0)‖_F.
    """

    deficiency: float
    change: float
    change_frobenius: float


def natural(
    structure: Structure,
    setting: Setting,
    damping: float = 0.0,
    *,
    loss: nn.Module | None = None,
    metric: nn.Module | None = None,
) -> Direction:
    """Return natural gradient of a loss, the problem's own if None, with rows of the present parameters."""
    problem = setting.problem
    return lambda model: natural_gradient_step(
        structure, model, loss or problem.loss, setting.inputs, problem.train[1], damping=damping, metric=metric
    )


def gradient(setting: Setting) -> Direction:
    """Return the gradient of the summed loss ½‖u − y‖²."""
    problem = setting.problem

    def direction(model: nn.Module) -> Mapping[str, Tensor]:
        parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        loss = len(setting.inputs) * problem.loss(model(setting.inputs), problem.train[1])
        return dict(zip(parameters, torch.autograd.grad(loss, list(parameters.values())), strict=True))

    return direction


def _outputs_on_the_way(
    model: nn.Module, setting: Setting, direction: Direction, eta: float
) -> Iterator[Float[Tensor, " R"]]:
    """Yield the outputs before the first step θ ← θ − η·direction, and after each."""
    while True:
        yield outputs(model, setting.inputs)
        step = direction(model)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.requires_grad:
                    parameter.sub_(eta * step[name])


def descend(
    model: nn.Module, setting: Setting, direction: Direction, eta: float, steps: int
) -> Float[np.ndarray, "T R"]:
    """Take steps θ ← θ − η·direction; return the outputs before the first step and after each.

    Args:
        model: is trained.
        setting: its data.
        direction: gives the steps.
        eta: learning rate η.
        steps: their number.
    """
    path = islice(_outputs_on_the_way(model, setting, direction, eta), steps + 1)
    return np.asarray(torch.stack(list(path)).numpy(force=True))


def follow(
    model: nn.Module,
    setting: Setting,
    structure: Structure,
    direction: Direction,
    eta: float,
    steps: int,
    look: Callable[[Rows], Look],
) -> tuple[Float[np.ndarray, "T R"], list[Look]]:
    """Descend, and look at the Jacobian before the first step and after each; stop where the run diverges.

    A step leaves the rows of its starting point in the structure, so only the last point costs a sweep of its own.

    Args:
        model: is trained.
        setting: its data.
        structure: the one that `direction` fills.
        direction: natural gradient.
        eta: learning rate η.
        steps: their number; fewer are taken if the residual grows beyond `DIVERGED`.
        look: what is seen of J.
    """
    seen: list[Look] = []

    def looking(now: nn.Module) -> Mapping[str, Tensor]:
        step = direction(now)
        seen.append(look(structure.rows.jacobian()))
        return step

    path = []
    for u in islice(_outputs_on_the_way(model, setting, looking, eta), steps + 1):
        path.append(u)
        if not (u - setting.targets).norm() <= DIVERGED * setting.residual.norm():
            break
    return np.asarray(torch.stack(path).numpy(force=True)), [*seen, look(curvlab.jacobian(model, setting.inputs))]


def squared_residuals(path: Float[np.ndarray, "T R"], setting: Setting) -> Float[np.ndarray, " T"]:
    """‖r(k)‖² of outputs over time."""
    return np.asarray(np.square(path - setting.targets.numpy(force=True)).sum(1))


def contraction(squared: Float[np.ndarray, " T"]) -> float:
    """Geometric mean over the steps of ‖r(k+1)‖²/‖r(k)‖²."""
    counted = squared[:-1] > FLOOR**2 * squared[0]
    return float(np.exp(np.log((squared[1:] / squared[:-1])[counted]).mean()))


def excess(squared: Float[np.ndarray, " T"], rate: float) -> float:
    """Largest excess of ‖r(k)‖²/‖r(0)‖² over rate^k."""
    return max(0.0, float(np.max(squared / squared[0] - rate ** np.arange(len(squared)))))


def inspect(rows: Rows, setting: Setting) -> Point:
    """Compare a Jacobian with that at initialisation, by Gram matrices."""
    gram = rows.gram()
    # Rows show smaller singular values than their Gram matrix does, at the price of another sweep over them.
    missing = 0 if rank(gram).full else rows.R - rank(rows).rank
    cross = rows.gram(setting.jacobian)
    difference = gram - cross - cross.T + setting.gram
    squares = torch.linalg.eigvalsh((difference + difference.T) / 2).clamp_min(0)
    return Point(
        deficiency=missing / rows.R,
        change=float(squares[-1].sqrt()),
        change_frobenius=float(squares.sum().sqrt()),
    )


def unit_rank(rows: Rows) -> float:
    """Row rank of single units of the first layer, the mean over some of them, over the number of rows."""
    a, g = rows.layers[0].factors
    units = torch.linspace(0, g.shape[-1] - 1, min(UNITS, g.shape[-1])).long()
    blocks = torch.einsum("nu,ni->uni", g[0, :, 0, 0][:, units], a[:, 0, 0])
    return float(torch.linalg.matrix_rank(blocks).double().mean()) / rows.R


def movement(model: nn.Module, setting: Setting) -> float:
    """‖θ − θ(0)‖."""
    start = dict(setting.problem.model.named_parameters())
    squares = [(p - start[name]).detach().square().sum() for name, p in model.named_parameters() if p.requires_grad]
    return float(torch.stack(squares).sum().sqrt())


def displaced(setting: Setting, radius: float, towards: Mapping[str, Tensor]) -> nn.Module:
    """Return the network at a distance from its initialisation, in a direction of any length."""
    length = float(torch.stack([part.square().sum() for part in towards.values()]).sum().sqrt())
    model = copy.deepcopy(setting.problem.model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in towards:
                parameter.add_(radius / length * towards[name])
    return model
