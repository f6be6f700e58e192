"""Condition 2 in the whole ball, on few random inputs: its worst point, and theorem 1 where it is certain (claims 2 and 3)."""

from itertools import product
from math import e, pi, sqrt

import numpy as np
import torch
from torch import Tensor

from analyses.claims import claim
from analyses.jacobian_rank.config import Config
from analyses.jacobian_rank.descent import descend, excess, on_surface
from analyses.jacobian_rank.points import BOTH, SYNTHETIC, experiment, page, seconds
from analyses.jacobian_rank.setting import BOUND_TOLERANCE, Setting
from curvlab import study, theory
from curvlab.fisher import Full

SAMPLES = 4
MULTIPLES = (1, 16)
"""Widths, in the largest of the other experiments."""
ETA, STEPS = 0.1, 5
STEEPEST = sqrt(8 / (pi * e))
"""Largest slope of φ′ for erf, at pre-activations ±√½."""
MOVES = np.linspace(-3, 3, 61)
"""Moves of a pre-activation that the search tries where φ′ is smooth."""


def _points(config: Config) -> list[study.Point]:
    if config.swept_widths == (0,):
        return []
    at = {"problem": SYNTHETIC, "similarity": 0.0, "samples": SAMPLES}
    pairs = product(config.activation, MULTIPLES)
    return [{**at, "width": factor * config.swept_widths[-1], "activation": name} for name, factor in pairs]


def _worst(setting: Setting, activation: str, sample: int) -> dict[str, Tensor]:
    """Return a direction to a point of the ball where J has changed much.

    It moves the units in which a sample's φ′ changes most for the way that they go along its input, as many as the radius allows.
    """
    x = setting.inputs[sample]
    u = (setting.problem.model.get_parameter("hidden.weight") @ x).numpy(force=True)
    if activation == "relu":
        way, gain = -u, np.ones_like(u)
    else:
        change = np.square(np.exp(-np.square(u[:, None] + MOVES)) - np.exp(-np.square(u))[:, None])
        best = (change / np.maximum(np.square(MOVES), 1e-12)).argmax(1)
        way, gain = MOVES[best], change[np.arange(len(u)), best]
    order = np.argsort(np.square(way) / np.maximum(gain, 1e-300))
    reached = order[np.cumsum(np.square(way[order])) < setting.radius**2]
    moves = np.zeros_like(u)
    moves[reached] = way[reached]
    return {"hidden.weight": torch.outer(torch.from_numpy(moves).to(x), x)}


def _bound(setting: Setting) -> float:
    """C over the whole ball for erf: ‖ΔJ‖ ≤ max|φ″|·‖ΔW Xᵀ‖_F/√m, and ‖ΔW‖_F is at most the radius."""
    norm = float(torch.linalg.matrix_norm(setting.inputs, 2))
    units = len(setting.problem.model.get_buffer("signs"))
    return theory.stability_constant(STEEPEST * norm * setting.radius / sqrt(units), float(setting.eigenvalues[0]))


def _measure(cell: study.Cell, context: study.Context[Config]) -> study.Observations:
    setting, activation = Setting.of(cell, context.config), str(cell["activation"])
    if not setting.full_rank:
        return []
    worst = max(on_surface(setting, _worst(setting, activation, sample)) for sample in range(SAMPLES))
    rows = [study.observed("constant_worst", worst)]
    if activation == "erf":
        C = _bound(setting)
        squared = setting.squared_residuals(descend(setting, setting.natural(Full()), ETA, STEPS))
        silent = study.outside("condition 2 is not certain in the whole ball with an allowed step")
        status = {} if theory.largest_step(C) >= ETA else silent
        rows += [study.observed("constant_bound", C), study.observed("worst_over_bound", worst / C)]
        rows.append(study.observed("excess", excess(squared, theory.ngd_rate_bound(ETA)), **status))
    return rows


def _claims(config: Config) -> list[study.Claim]:
    return [
        claim("ball-worst-relu", page("condition 2", "claim 2, derived"), study.Always("constant_worst", "greater", 0.5),
              "With ReLU condition 2 does not hold in the whole ball, at any of the widths.",
              "C_emp at the worst point of the ball's surface that a search finds; condition 2 wants it below ½.",
              study.supported(
                  "The k units nearest to where a sample is put out are O(k/m) away and cost k³/m² of the squared radius in all: "
                  "a share R^(2/3) m^(−1/3) of the patterns flips, and C_emp falls as m^(−1/6) only."
              ),
              group="derived", at={"activation": "relu"}, bound_from="condition 2"),
        claim("ball-bound-erf", page("condition 2", "claim 2, derived"), study.Always("constant_bound", "less", 0.5),
              "With erf condition 2 holds in the whole ball of the widest network.",
              "A bound on C_emp at all points: 3 max|φ″| ‖X‖₂ R/√(m λ_min(G(0))), R the radius.",
              study.supported("The bound falls as m^(−1/2)."), group="derived", bound_from="condition 2",
              at={"activation": "erf", "width": MULTIPLES[-1] * config.swept_widths[-1]}),
        claim("ball-search", page("condition 2", "claim 2, derived"), study.Always("worst_over_bound", "less", 1.0),
              "With erf the search finds no point of the ball beyond that bound.", "C_emp at the worst point over the bound.",
              study.supported("It is a bound on all points."), group="self-check", at={"activation": "erf"}),
        claim("rate-bound", page("theorem 1", "claim 3"), study.Always("excess", "less", BOUND_TOLERANCE),
              "Where condition 2 is certain in the whole ball and η is allowed, ‖u(k) − y‖² ≤ (1 − η)^k ‖u(0) − y‖² at every step.",
              f"Largest excess of ‖r(k)‖²/‖r(0)‖² over (1 − η)^k at η = {ETA:g}, erf; C is that bound.",
              study.supported("It is a theorem."), group="paper", at={"activation": "erf"},
              bound_from="the theorem, and round-off"),
    ]  # fmt: skip


def _memory(cell: study.Cell, _: Config) -> float:
    return 4e8 + 4e3 * int(cell["width"])


BALL = experiment(_points, varies=BOTH, name="ball", measure=_measure, claims=_claims,
                  seconds=seconds(0.1, 0.1), memory=_memory)  # fmt: skip
