"""Strongly convex losses of the outputs (claim 5): natural gradient as gradient descent, and as Newton's method, on them."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from functools import partial
from math import inf, isfinite

import numpy as np
import pandas as pd
from scipy.optimize import brentq
from torch import Tensor, nn

from analyses.estimates import at_largest_width, by_seed, identities
from analyses.jacobian_rank.config import Config
from analyses.jacobian_rank.descent import descend, excess, follow, inspect, natural
from analyses.jacobian_rank.part import PAPER, Part, cells_of
from analyses.jacobian_rank.parts.training import EASY
from analyses.jacobian_rank.setting import Setting, flat, setting_of
from analyses.part import TOLERANCE_FACTOR, Observations, where
from curvlab import theory
from curvlab.fisher import Full, natural_gradient_step
from curvlab.nn import HalfSquaredError, linearize
from curvlab.study import Cell, Claim, Equivalence, Identity

NAME = "general-loss"
REGULARISER = 0.25
"""μ of the loss log(1 + exp(−su)) + μu²/2, s the sign of the target; its gradient has the Lipschitz constant L = μ + ¼."""
LIPSCHITZ = REGULARISER + 0.25
SHARE = 0.5
"""Step, in units of the largest that any bound covers, 2/(μ + L)."""
STEPS = 10
BOUND_TOLERANCE = 1e-9


class RegularisedLogistic(nn.Module):
    """Mean over samples of log(1 + exp(−su)) + μu²/2."""

    def forward(self, u: Tensor, y: Tensor) -> Tensor:
        """Return the loss."""
        return (nn.functional.softplus(-y.sign() * u) + REGULARISER / 2 * u.square()).mean()


def minimiser() -> float:
    """|u⋆|, where the slope −σ(−|u|) + μ|u| vanishes; the sign is that of the target."""
    return float(brentq(lambda u: REGULARISER * u - 1 / (1 + np.exp(u)), 0.0, 10.0, xtol=1e-15))


def _cells(config: Config) -> list[Cell]:
    points: list[dict[str, object]] = [
        {"data": "own", "width": width, "activation": activation}
        for activation in config.activation
        for width in config.swept_widths
    ]
    if config.swept_widths != (0,):
        easy = {**EASY, "data": "easy", "width": config.swept_widths[-1]}
        points += [{**easy, "activation": activation} for activation in config.activation]
    return cells_of(NAME, config, points)


def _measure(cell: Cell, config: Config) -> Observations:
    setting = setting_of(cell, config)
    y = setting.targets.numpy(force=True)
    optimum = np.sign(y) * minimiser()
    eta = SHARE * theory.general_largest_step(0.0, REGULARISER, LIPSCHITZ)
    structure = Full()
    path, points = follow(
        copy.deepcopy(setting.problem.model),
        setting,
        structure,
        natural(structure, setting, loss=RegularisedLogistic(), metric=HalfSquaredError()),
        eta,
        STEPS,
        partial(inspect, setting=setting),
    )
    squared = np.square(path - optimum).sum(1)
    C = inf
    if setting.full_rank:
        C = theory.stability_constant(max(point.change for point in points), float(setting.eigenvalues[0]))
    covered = isfinite(C) and eta <= theory.general_largest_step(C, REGULARISER, LIPSCHITZ)
    descended = _function_space(path[0], y, eta)[: len(path)]
    rows: list[dict[str, object]] = [
        {
            "quantity": "excess" if covered else "excess_uncovered",
            "value": excess(squared, theory.general_rate(eta, REGULARISER, LIPSCHITZ)),
            "tolerance": BOUND_TOLERANCE,
        },
        {
            "quantity": "path_error",
            "value": float(np.linalg.norm(path - descended) / np.linalg.norm(descended - descended[0])),
        },
    ]
    if setting.full_rank and cell["data"] == "own" and int(cell["width"]) <= config.swept_widths[0]:
        rows.append(_newton(setting))
    return rows


def _function_space(start: np.ndarray, y: np.ndarray, eta: float) -> np.ndarray:
    """Gradient descent on the summed loss as a function of the outputs."""
    path = [start]
    for _ in range(STEPS):
        u, sign = path[-1], np.sign(y)
        path.append(u - eta * (REGULARISER * u - sign / (1 + np.exp(sign * u))))
    return np.stack(path)


def _newton(setting: Setting) -> dict[str, object]:
    """One step in the metric of the loss itself on the linearised network, against Newton's step on the outputs."""
    targets = setting.problem.train[1]
    labels = (targets > 0).to(targets)
    model = linearize(setting.problem.model)

    def direction(now: nn.Module) -> Mapping[str, Tensor]:
        return natural_gradient_step(Full(), now, nn.BCEWithLogitsLoss(), setting.inputs, labels)

    before, after = descend(model, setting, direction, 1.0, 1)
    p = 1 / (1 + np.exp(-before))
    step = (p - flat(labels).numpy(force=True)) / (p * (1 - p))
    error = float(np.abs(after - (before - step)).max() / np.abs(step).max())
    weights = float((p * (1 - p)).max() / (p * (1 - p)).min())
    condition = weights * float(setting.eigenvalues[-1] / setting.eigenvalues[0])
    tolerance = TOLERANCE_FACTOR * len(p) * float(np.finfo(p.dtype).eps) * condition
    return {"quantity": "newton_error", "value": error, "tolerance": tolerance}


def _only_covered(table: pd.DataFrame) -> str | None:
    if "excess" in set(table["quantity"]):
        return None
    return "No run has a C that admits its step; wider networks would (--widths)."


def _claims(config: Config) -> list[Claim]:  # noqa: ARG001
    return [
        Claim(
            id="general-bound",
            statement="For a strongly convex loss of the outputs ‖u(k) − u⋆‖² shrinks by 1 − 2ημL/(μ + L) per step or more, "
            "where C admits the step.",
            source=f"{PAPER}, general losses (theory file, claim 5; constants derived)",
            measured="Largest excess over the bound, regularised logistic loss (μ = 0.25, L = 0.5), η = 1/(μ + L), C on the way.",
            rule=Identity(),
            estimate=identities,
            expected="supported",
            reason="It is a theorem.",
            assumptions=_only_covered,
            needs=where(NAME),
            quantities=("excess",),
        ),
        Claim(
            id="general-descent",
            statement="In the metric JᵀJ the outputs of a wide network follow gradient descent on the loss as a function of them.",
            source=f"{PAPER}, general losses (theory file, claim 5, derived)",
            measured="Distance of the paths, relative to the length of the latter's moves, at the largest width.",
            rule=Equivalence(0.0, 0.05),
            estimate=at_largest_width(by_seed),
            expected="supported",
            reason="J J⁺ = I, and J hardly changes.",
            needs=where(NAME, data="own"),
            quantities=("path_error",),
        ),
        Claim(
            id="general-newton",
            statement="In the metric of the loss itself, JᵀHJ, a step of the linearised network is Newton's step on the outputs.",
            source=f"{PAPER}, general losses (theory file, claim 5, derived)",
            measured="Distance of the outputs after one step of a logistic loss at η = 1 from u − H⁻¹∂ℓ, relative to the step.",
            rule=Identity(),
            estimate=identities,
            expected="supported",
            reason="J (JᵀHJ)⁺ Jᵀ = H⁻¹ at full row rank.",
            needs=where(NAME),
            quantities=("newton_error",),
        ),
    ]


PART = Part(NAME, _cells, _measure, _claims, seconds=lambda width: 0.1 + 0.4 * width / 16384)
