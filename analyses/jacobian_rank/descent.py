"""Real parameter steps, and what is seen along them: outputs, the kernel, the change of the Jacobian."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

import curvlab
from analyses.descent import Descent, Direction, length
from analyses.jacobian_rank.setting import Setting
from curvlab.fisher import Structure
from curvlab.rows import Rows
from curvlab.study import follow, observed

UNITS = 64
"""Units whose blocks are looked at one by one."""
DIVERGED = 1e3
"""Residual, relative to the first, above which a run counts as diverged."""
FLOOR = 1e-6
"""Residual, relative to the first, below which round-off and not the rate decides."""


def descend(
    setting: Setting, direction: Direction, eta: float, steps: int, model: nn.Module | None = None
) -> Float[np.ndarray, "T R"]:
    """Take steps with a model, a copy of the network if None; return the outputs before the first and after each."""
    return follow(Descent(model or setting.network(), direction, eta, setting.see), steps).series("outputs")


def watch(
    setting: Setting,
    structure: Structure,
    eta: float,
    steps: int,
    *,
    model: nn.Module | None = None,
    direction: Direction | None = None,
    see: Callable[[Rows], Any] | None = None,
) -> tuple[Float[np.ndarray, "T R"], list[Any]]:
    """Take steps of natural gradient; return the outputs, and what is seen of J, before the first and after each.

    It ends where the residual grows beyond `DIVERGED`. Cost: that of the steps, and one more sweep for the last point.

    Args:
        setting: The network and its data.
        structure: Of the Fisher matrix.
        eta: Learning rate η.
        steps: Their number.
        model: Is trained; a copy of the network if None.
        direction: Gives the steps, and fills the structure; natural gradient of the problem's loss if None.
        see: What is seen of J; `Setting.inspect` if None.
    """
    model = model or setting.network()
    see = see or setting.inspect
    direction = direction or setting.natural(structure)
    y = setting.targets.numpy(force=True)
    limit = DIVERGED * float(setting.residual.norm())
    path = [setting.see(model)["outputs"]]
    seen: list[Any] = []
    while len(seen) < steps and np.linalg.norm(path[-1] - y) <= limit:
        path.append(descend(setting, direction, eta, 1, model)[-1])
        seen.append(see(structure.rows.jacobian()))  # which the step left in the structure, those of its start
    return np.stack(path), [*seen, see(curvlab.jacobian(model, setting.inputs))]


def contraction(squared: Float[np.ndarray, " T"]) -> float:
    """Geometric mean over the steps of ‖r(k+1)‖²/‖r(k)‖²."""
    counted = squared[:-1] > FLOOR**2 * squared[0]
    return float(np.exp(np.log((squared[1:] / squared[:-1])[counted]).mean()))


def excess(squared: Float[np.ndarray, " T"], rate: float) -> float:
    """Largest excess of ‖r(k)‖²/‖r(0)‖² over rate^k."""
    return max(0.0, float(np.max(squared / squared[0] - rate ** np.arange(len(squared)))))


def unit_rank(rows: Rows) -> list[dict[str, object]]:
    """Row rank of some units of the first layer: the mean over the number of rows, and its distance from `ranks_and_active`."""
    a, g = rows.layers[0].factors
    units = torch.linspace(0, g.shape[-1] - 1, min(UNITS, g.shape[-1])).long()
    ranks, active = ranks_and_active(torch.einsum("nu,ni->uni", g[0, :, 0, 0][:, units], a[:, 0, 0]))
    return [
        observed("unit_rank", ranks.mean() / rows.R),
        observed("unit_surprise", int(np.abs(ranks - active).max()), tolerance=0.0),
    ]


def ranks_and_active(blocks: Float[Tensor, "U R width"]) -> tuple[Int[np.ndarray, " U"], Int[np.ndarray, " U"]]:
    """Ranks of units' blocks, and the samples on which these are active, at most the unit's parameters."""
    active = (blocks != 0).any(-1).sum(-1).clamp_max(blocks.shape[-1])
    return torch.linalg.matrix_rank(blocks).numpy(force=True), active.numpy(force=True)


def moved(model: nn.Module, setting: Setting) -> dict[str, Tensor]:
    """θ − θ(0)."""
    start = dict(setting.problem.model.named_parameters())
    return {name: (p - start[name]).detach() for name, p in model.named_parameters() if p.requires_grad}


def displaced(setting: Setting, radius: float, towards: Mapping[str, Tensor]) -> nn.Module:
    """Return the network at a distance from its initialisation, in a direction of any length."""
    model, scale = setting.network(), radius / length(towards)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in towards:
                parameter.add_(scale * towards[name])
    return model


def on_surface(setting: Setting, direction: Mapping[str, Tensor]) -> float:
    """C_emp where a direction meets the surface of the ball of condition 2."""
    rows = curvlab.jacobian(displaced(setting, setting.radius, direction), setting.inputs)
    return setting.stability_constant([setting.inspect(rows)])
