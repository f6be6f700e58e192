"""Gradient descent needs κ(G) times the steps of natural gradient; damping brings the modes back (claims 6 and 11)."""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import partial
from math import ceil, log

import numpy as np
import torch
from jaxtyping import Float

from analyses.estimates import by_seed, identities, slope_by_seed
from analyses.jacobian_rank.config import Config
from analyses.jacobian_rank.descent import Direction, descend, gradient, natural
from analyses.jacobian_rank.part import PAPER, SYNTHETIC, Part, cells_of
from analyses.jacobian_rank.setting import Setting, setting_of
from analyses.part import TOLERANCE_FACTOR, Observations, where
from curvlab import theory
from curvlab.fisher import Full
from curvlab.nn import linearize
from curvlab.study import Cell, Claim, Equivalence, Identity

NAME = "modes"
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


def _cells(config: Config) -> list[Cell]:
    if config.swept_widths == (0,):
        return []
    width = min(WIDTH, config.swept_widths[-1])
    base = {"problem": SYNTHETIC, "width": width, "activation": config.activation[0], "samples": SAMPLES}
    return cells_of(NAME, config, [{**base, "similarity": similarity} for similarity in SIMILARITIES])


def _least_mode(setting: Setting, vectors: Float[np.ndarray, "N N"]) -> Setting:
    """Return the setting with targets that put the initial residual along the least mode."""
    problem = setting.problem
    least = torch.from_numpy(vectors[:, -1].copy()).to(setting.initial)
    targets = (setting.initial - RESIDUAL * least)[:, None]
    return Setting(replace(problem, train=(setting.inputs, targets)))


def _steps_to_target(setting: Setting, direction: Direction, eta: float) -> int | None:
    """Steps until ‖r‖ has shrunk to the target; None if they are too many."""
    model = copy.deepcopy(setting.problem.model)
    y, done, chunk = setting.targets.numpy(force=True), 0, 8
    while done < MOST_STEPS:
        left = np.linalg.norm(descend(model, setting, direction, eta, chunk)[1:] - y, axis=1) / RESIDUAL
        if (left <= TARGET).any():
            return done + 1 + int(np.argmax(left <= TARGET))
        done += chunk
    return None


def _measure(cell: Cell, config: Config) -> Observations:
    setting = setting_of(cell, config)
    values, vectors = theory.kernel_modes(setting.gram.numpy(force=True))
    condition = float(values[0] / values[-1])
    worst = _least_mode(setting, vectors)
    natural_steps = _steps_to_target(worst, natural(Full(), worst), ETA)
    descent_steps = _steps_to_target(worst, gradient(worst), 1 / float(values[0]))
    rows: list[dict[str, object]] = [{"quantity": "smallest", "value": float(values[-1])}]
    runs = (("natural", natural_steps, 1 - ETA), ("descent", descent_steps, 1 - 1 / condition))
    for name, steps, factor in runs:
        predicted = ceil(log(TARGET) / log(factor))
        taken = float("nan") if steps is None else float(steps)
        at: dict[str, object] = {"condition": condition, "predicted": predicted}
        if steps is None:
            at["status"] = f"more than {MOST_STEPS} steps"
        rows.append({"quantity": f"{name}_steps", "value": taken, **at})
        rows.append({"quantity": f"{name}_steps_ratio", "value": taken / predicted, **at})
    return rows + _damped(setting, values, vectors)


def _damped(
    setting: Setting, values: Float[np.ndarray, N], vectors: Float[np.ndarray, "N N"]
) -> list[dict[str, object]]:
    """Contraction of every mode of the linearised network in one damped step, against 1 − λ/(λ + μ)."""
    y, start = setting.targets.numpy(force=True), setting.residual.numpy(force=True)
    rows: list[dict[str, object]] = []
    for relative in DAMPINGS:
        mu = relative * float(values[0])
        # The Fisher matrix is JᵀJ/N, so μ of JJᵀ + μI is Nρ.
        direction = natural(Full(), setting, damping=mu / len(y))
        end = descend(linearize(setting.problem.model), setting, direction, 1.0, 1)[-1] - y
        expected = vectors @ (theory.damped_contraction(values, mu) * (vectors.T @ start))
        scale = max(1.0, float(np.linalg.norm(y)) / float(np.linalg.norm(start)))
        rows.append(
            {
                "quantity": "damped_error",
                "value": float(np.abs(end - expected).max() / np.linalg.norm(start)),
                "tolerance": TOLERANCE_FACTOR * len(y) * np.finfo(y.dtype).eps * scale / relative,
                "damping": relative,
            }
        )
    return rows


def _claims(config: Config) -> list[Claim]:
    if not _cells(config):
        return []
    return [
        Claim(
            id="modes-natural",
            statement="The number of steps of natural gradient does not depend on λ_min(G).",
            source=f"{PAPER}, theorem 3 (theory file, claim 6)",
            measured=f"Slope of log steps against log κ(G), steps until {TARGET:g} of a residual along the least mode is left at "
            f"η = {ETA:g}.",
            rule=Equivalence(0.0, 0.1),
            estimate=partial(slope_by_seed, against="condition"),
            expected="supported",
            reason="All modes contract by 1 − η.",
            needs=where(NAME),
            quantities=("natural_steps",),
        ),
        Claim(
            id="modes-descent",
            statement="The number of steps of gradient descent is proportional to κ(G).",
            source=f"{PAPER}, after theorem 3 (theory file, claim 6, derived)",
            measured="The same slope for gradient descent at η = 1/λ_max(G).",
            rule=Equivalence(1.0, 0.1),
            estimate=partial(slope_by_seed, against="condition"),
            expected="supported",
            reason="The least mode contracts by 1 − 1/κ(G).",
            needs=where(NAME),
            quantities=("descent_steps",),
        ),
        Claim(
            id="modes-descent-exact",
            statement="Gradient descent takes log(target)/log(1 − 1/κ(G)) steps for a residual along the least mode.",
            source=f"{PAPER}, after theorem 3 (theory file, claim 6, derived)",
            measured="Steps over that number, the mean over the similarities.",
            rule=Equivalence(1.0, 0.1),
            estimate=by_seed,
            expected="supported",
            reason="The least mode contracts by 1 − 1/κ(G), as long as J stays.",
            needs=where(NAME),
            quantities=("descent_steps_ratio",),
        ),
        Claim(
            id="modes-damped",
            statement="With (JJᵀ + μI)⁻¹ mode i of the linearised network contracts by 1 − λ_i/(λ_i + μ).",
            source=f"{PAPER}, NGD with damping (theory file, claim 11, derived)",
            measured="Distance of the residual after one damped step at η = 1 from that law, relative to ‖r(0)‖.",
            rule=Identity(),
            estimate=identities,
            expected="supported",
            reason="J(JᵀJ + μI)⁻¹Jᵀ = G(G + μI)⁻¹.",
            needs=where(NAME),
            quantities=("damped_error",),
        ),
    ]


PART = Part(NAME, _cells, _measure, _claims, seconds=lambda width: 0.1 + 0.4 * width / 4096)
