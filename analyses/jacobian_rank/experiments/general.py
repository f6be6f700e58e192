"""Strongly convex losses of the outputs (claim 5): natural gradient as gradient descent, and as Newton's method, on them."""

from dataclasses import replace
from math import inf, isfinite

import numpy as np
from scipy.optimize import brentq
from torch import Tensor, nn

from analyses.claims import claim
from analyses.jacobian_rank.config import Config
from analyses.jacobian_rank.descent import descend, excess, watch
from analyses.jacobian_rank.points import experiment, own_and_few, page, seconds
from analyses.jacobian_rank.setting import BOUND_TOLERANCE, Setting
from curvlab import study, theory
from curvlab.fisher import Full
from curvlab.nn import HalfSquaredError, linearize

REGULARISER = 0.25
"""μ of the loss log(1 + exp(−su)) + μu²/2, s the sign of the target; its gradient has the Lipschitz constant L = μ + ¼."""
LIPSCHITZ = REGULARISER + 0.25
SHARE = 0.5
"""Step, in units of the largest that any bound covers, 2/(μ + L)."""
STEPS = 10


class RegularisedLogistic(nn.Module):
    """Mean over samples of log(1 + exp(−su)) + μu²/2."""

    def forward(self, u: Tensor, y: Tensor) -> Tensor:
        """Return the loss."""
        return (nn.functional.softplus(-y.sign() * u) + REGULARISER / 2 * u.square()).mean()


def minimiser() -> float:
    """|u⋆|, where the slope −σ(−|u|) + μ|u| vanishes; the sign is that of the target."""
    return float(brentq(lambda u: REGULARISER * u - 1 / (1 + np.exp(u)), 0.0, 10.0, xtol=1e-15))


def _measure(cell: study.Cell, context: study.Context[Config]) -> study.Observations:
    setting, smallest = Setting.of(cell, context.config), context.config.swept_widths[0]
    y = setting.targets.numpy(force=True)
    optimum = np.sign(y) * minimiser()
    eta = SHARE * theory.general_largest_step(0.0, REGULARISER, LIPSCHITZ)
    structure = Full()
    direction = setting.natural(structure, loss=RegularisedLogistic(), metric=HalfSquaredError())
    path, seen = watch(setting, structure, eta, STEPS, direction=direction)
    above = excess(np.square(path - optimum).sum(1), theory.general_rate(eta, REGULARISER, LIPSCHITZ))
    C = setting.stability_constant(seen) if setting.full_rank else inf
    covered = isfinite(C) and eta <= theory.general_largest_step(C, REGULARISER, LIPSCHITZ)
    status = {} if covered else study.outside("C does not admit the step; it would on wider networks (--widths)")
    descended = _function_space(path[0], y, eta)[: len(path)]
    error = np.linalg.norm(path - descended) / np.linalg.norm(descended - descended[0])
    rows = [
        study.observed("excess", above, **status),
        study.observed("path_error", float(error)),
    ]
    if setting.full_rank and cell["data"] == "own" and int(cell["width"]) <= smallest:
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
    problem, (inputs, targets) = setting.problem, setting.problem.train
    labelled = Setting(replace(problem, train=(inputs, (targets > 0).to(targets))))
    direction = labelled.natural(Full(), nn.BCEWithLogitsLoss())
    before, after = descend(labelled, direction, 1.0, 1, linearize(problem.model))
    p = 1 / (1 + np.exp(-before))
    weights = p * (1 - p)
    step = (p - labelled.targets.numpy(force=True)) / weights
    error = np.abs(after - (before - step)).max() / np.abs(step).max()
    condition = weights.max() / weights.min() * setting.eigenvalues[-1] / setting.eigenvalues[0]
    tolerance = study.round_off(len(p), float(condition), targets.dtype)
    return study.observed("newton_error", error, tolerance=tolerance)


LOSSES = "general losses"
CLAIMS = [
    claim("general-bound", page(LOSSES, "claim 5; constants derived"), study.Always("excess", "less", BOUND_TOLERANCE),
          "For a strongly convex loss of the outputs ‖u(k) − u⋆‖² shrinks by 1 − 2ημL/(μ + L) per step or more, where C admits "
          "the step.",
          "Largest excess over the bound, regularised logistic loss (μ = 0.25, L = 0.5), η = 1/(μ + L), C along the run.",
          study.supported("It is a theorem."), group="paper", bound_from="the theorem, and round-off"),
    claim("general-descent", page(LOSSES, "claim 5, derived"),
          study.Inequality("path_error", "less", 0.05, centre="geometric mean"),
          "In the metric JᵀJ the outputs of a wide network follow gradient descent on the loss as a function of them.",
          "Distance of the paths, relative to the length of the latter's moves, at the largest width.",
          study.supported("J J⁺ = I, and J hardly changes."),
          group="derived", at={"data": "own"}, estimate=study.at_largest_width(study.geometric_by_seed)),
    claim("general-newton", page(LOSSES, "claim 5, derived"), study.Identity("newton_error"),
          "In the metric of the loss itself, JᵀHJ, a step of the linearised network is Newton's step on the outputs.",
          "Distance of the outputs after one step of a logistic loss at η = 1 from u − H⁻¹∂ℓ, relative to the step.",
          study.supported("J (JᵀHJ)⁺ Jᵀ = H⁻¹ at full row rank."), group="self-check"),
]  # fmt: skip

GENERAL = experiment(own_and_few, name="general-loss", measure=_measure, claims=CLAIMS, seconds=seconds(0.1, 0.4))
