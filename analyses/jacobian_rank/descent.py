"""Real parameter steps, and what is followed along them: outputs, the kernel, the change of the Jacobian."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass

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


UNITS = 64
"""Units whose blocks are looked at one by one."""


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


def natural(structure: Structure, setting: Setting, damping: float = 0.0) -> Direction:
    """Return natural gradient of the problem's loss, with rows of the present parameters."""
    problem = setting.problem
    return lambda model: natural_gradient_step(
        structure, model, problem.loss, setting.inputs, problem.train[1], damping=damping
    )


def gradient(setting: Setting) -> Direction:
    """Return the gradient of the summed loss ½‖u − y‖²."""
    problem = setting.problem

    def direction(model: nn.Module) -> Mapping[str, Tensor]:
        parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        loss = len(setting.inputs) * problem.loss(model(setting.inputs), problem.train[1])
        return dict(zip(parameters, torch.autograd.grad(loss, list(parameters.values())), strict=True))

    return direction


def descend(
    model: nn.Module,
    setting: Setting,
    direction: Direction,
    eta: float,
    steps: int,
    watch: Callable[[nn.Module], None] = lambda _: None,
) -> Float[np.ndarray, "T R"]:
    """Take steps θ ← θ − η·direction; return the outputs before the first step and after each.

    Args:
        model: is trained.
        setting: its data.
        direction: gives the steps.
        eta: learning rate η.
        steps: their number.
        watch: called after every step.
    """
    path = [outputs(model, setting.inputs)]
    for _ in range(steps):
        step = direction(model)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.requires_grad:
                    parameter.sub_(eta * step[name])
        path.append(outputs(model, setting.inputs))
        watch(model)
    return np.asarray(torch.stack(path).numpy(force=True))


def inspect(model: nn.Module, setting: Setting) -> Point:
    """Compare a network's Jacobian with that at initialisation, by Gram matrices."""
    rows = curvlab.jacobian(model, setting.inputs)
    gram = rows.gram()
    found = rank(rows)
    cross = rows.gram(setting.jacobian)
    difference = gram - cross - cross.T + setting.gram
    squares = torch.linalg.eigvalsh((difference + difference.T) / 2).clamp_min(0)
    return Point(
        deficiency=(rows.R - found.rank) / rows.R,
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
