"""Gradient descent needs κ(G) times the steps of natural gradient; damping brings the modes back (claims 6 and 11)."""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from math import ceil, log
from typing import Any

import numpy as np
import torch
from jaxtyping import Float

from analyses.claims import claim
from analyses.descent import Descent, Direction
from analyses.jacobian_rank.config import Config
from analyses.jacobian_rank.descent import descend
from analyses.jacobian_rank.points import BOTH, SYNTHETIC, experiment, page, seconds
from analyses.jacobian_rank.setting import Setting
from curvlab import study, theory
from curvlab.fisher import Full
from curvlab.nn import linearize

SIMILARITIES = (0.0, 0.5, 0.9, 0.97)
"""Mean inner products of inputs; κ(G) grows nearly a hundredfold from the first to the last."""
SAMPLES = 12
WIDTH = 4096
ETA = 0.5
"""Step of natural gradient; gradient descent gets 1/λ_max(G), at which its fastest mode is solved at once."""
RESIDUAL = 0.1
"""‖r(0)‖. The residual is put along the least mode of the kernel, which decides how long gradient descent takes."""
TARGET = 0.1
"""Part of it that is to be left."""
MOST_STEPS = 4000
DAMPINGS = (1e-3, 1e-1)
"""ρ in units of λ_max(G)."""


def _points(config: Config) -> list[study.Point]:
    if config.swept_widths == (0,):
        return []
    width = min(WIDTH, config.swept_widths[-1])
    at = {"problem": SYNTHETIC, "width": width, "activation": config.activation[0], "samples": SAMPLES}
    return [{**at, "similarity": similarity} for similarity in SIMILARITIES]


def _least_mode(setting: Setting, vectors: Float[np.ndarray, "N N"]) -> Setting:
    """Return the setting with targets that put the initial residual along the least mode."""
    problem = setting.problem
    least = torch.from_numpy(vectors[:, -1].copy()).to(setting.initial)
    targets = (setting.initial - RESIDUAL * least)[:, None]
    return Setting(replace(problem, train=(setting.inputs, targets)))


def _steps_to_target(setting: Setting, direction: Direction, eta: float) -> int | None:
    """Steps until ‖r‖ has shrunk to the target; None if they are too many."""
    y = setting.targets.numpy(force=True)

    def reached(seen: Mapping[str, Any]) -> bool:
        return bool(np.linalg.norm(seen["outputs"] - y) / RESIDUAL <= TARGET)

    process = Descent(setting.network(), direction, eta, setting.see)
    last = study.follow(process, MOST_STEPS, until=reached).seen[-1]
    return int(last["step"]) if reached(last) else None


def _measure(cell: study.Cell, context: study.Context[Config]) -> study.Observations:
    setting = Setting.of(cell, context.config)
    values, vectors = theory.kernel_modes(setting.gram.numpy(force=True))
    condition = float(values[0] / values[-1])
    worst = _least_mode(setting, vectors)
    natural_steps = _steps_to_target(worst, worst.natural(Full()), ETA)
    descent_steps = _steps_to_target(worst, worst.gradient(), 1 / float(values[0]))
    rows = [study.observed("smallest", float(values[-1]))]
    runs = (("natural", natural_steps, 1 - ETA), ("descent", descent_steps, 1 - 1 / condition))
    for name, steps, factor in runs:
        predicted = ceil(log(TARGET) / log(factor))
        taken = float("nan") if steps is None else float(steps)
        at = {"condition": condition, "predicted": predicted}
        status = {"status": f"more than {MOST_STEPS} steps"} if steps is None else {}
        rows.append(study.observed(f"{name}_steps", taken, **at, **status))
        rows.append(study.observed(f"{name}_steps_ratio", taken / predicted, **at, **status))
    return rows + _damped(setting, values, vectors)


def _damped(
    setting: Setting, values: Float[np.ndarray, " N"], vectors: Float[np.ndarray, "N N"]
) -> list[dict[str, object]]:
    """Contraction of every mode of the linearised network in one damped step, against 1 − λ/(λ + μ)."""
    y, start = setting.targets.numpy(force=True), setting.residual.numpy(force=True)
    rows = []
    for relative in DAMPINGS:
        mu = relative * float(values[0])
        # The Fisher matrix is JᵀJ/N, so μ of JJᵀ + μI is Nρ.
        direction = setting.natural(Full(), damping=mu / len(y))
        end = descend(setting, direction, 1.0, 1, linearize(setting.problem.model))[-1] - y
        expected = vectors @ (theory.damped_contraction(values, mu) * (vectors.T @ start))
        error = np.abs(end - expected).max() / np.linalg.norm(start)
        tolerance = setting.round_off(1 / relative)
        rows.append(study.observed("damped_error", error, tolerance=tolerance, damping=relative))
    return rows


AGAINST_CONDITION = partial(study.slope_by_seed, against="condition")
AFTER = page("after theorem 3", "claim 6, derived")

CLAIMS = [
    claim("modes-natural", page("theorem 3", "claim 6"), study.Equivalence("natural_steps", 0.0, 0.1, centre="mean"),
          "The number of steps of natural gradient does not depend on λ_min(G).",
          f"Slope of log steps against log κ(G), steps until {TARGET:g} of a residual along the least mode is left at η = {ETA:g}.",
          study.supported("All modes contract by 1 − η."), group="paper", estimate=AGAINST_CONDITION),
    claim("modes-descent", AFTER, study.Equivalence("descent_steps", 1.0, 0.1, centre="mean"),
          "The number of steps of gradient descent is proportional to κ(G).",
          "The same slope for gradient descent at η = 1/λ_max(G).",
          study.supported("The least mode contracts by 1 − 1/κ(G)."), group="derived", estimate=AGAINST_CONDITION),
    claim("modes-descent-exact", AFTER, study.Equivalence("descent_steps_ratio", 1.0, 0.1, centre="geometric mean"),
          "Gradient descent takes log(target)/log(1 − 1/κ(G)) steps for a residual along the least mode.",
          "Steps over that number, the mean over the similarities.",
          study.supported("The least mode contracts by 1 − 1/κ(G), as long as J stays."),
          group="derived", estimate=study.geometric_by_seed),
    claim("modes-damped", page("NGD with damping", "claim 11, derived"), study.Identity("damped_error"),
          "With (JJᵀ + μI)⁻¹ mode i of the linearised network contracts by 1 − λ_i/(λ_i + μ).",
          "Distance of the residual after one damped step at η = 1 from that law, relative to ‖r(0)‖.",
          study.supported("J(JᵀJ + μI)⁻¹Jᵀ = G(G + μI)⁻¹."), group="self-check"),
]  # fmt: skip

MODES = experiment(_points, varies=BOTH, name="modes", measure=_measure, claims=CLAIMS, seconds=seconds(0.1, 1.6))
