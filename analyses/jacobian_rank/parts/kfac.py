"""K-FAC on the two-layer network: every sample decays by its leverage (claims 7 and 8)."""

from __future__ import annotations

import copy

import numpy as np

from analyses.estimates import at_largest_width, by_seed, identities, needs_several_widths, slope_by_seed
from analyses.jacobian_rank.config import Config
from analyses.jacobian_rank.descent import descend, natural
from analyses.jacobian_rank.part import PAPER, SYNTHETIC, Part, cells_of
from analyses.jacobian_rank.setting import setting_of
from analyses.part import TOLERANCE_FACTOR, Observations, where
from curvlab import theory
from curvlab.fisher import KFAC
from curvlab.nn import linearize
from curvlab.study import Cell, Claim, Identity, Inequality

NAME = "kfac"
STEPS = 5


def _cells(config: Config) -> list[Cell]:
    if "kfac" not in config.structures:
        return []
    points = [
        {"problem": SYNTHETIC, "width": width, "activation": activation, "similarity": 0.5}
        for activation in config.activation
        for width in (config.swept_widths if config.swept_widths != (0,) else ())
    ]
    return cells_of(NAME, config, points)


def _measure(cell: Cell, config: Config) -> Observations:
    setting = setting_of(cell, config)
    x = setting.inputs.numpy(force=True)
    y = setting.targets.numpy(force=True)
    start = setting.residual.numpy(force=True)
    leverage = theory.leverages(x)
    N, steps = len(x), range(STEPS + 1)
    eta = 1.0
    predicted = theory.kfac_residual(leverage, eta, steps, start)
    worst = theory.kfac_worst_rate(x, eta) ** np.arange(STEPS + 1)
    norm = float(np.linalg.norm(start))
    structure = KFAC()
    rows: list[dict[str, object]] = []
    runs = {"network": copy.deepcopy(setting.problem.model)}
    if int(cell["width"]) == config.swept_widths[0]:
        runs["linearised"] = linearize(setting.problem.model)
    for run, model in runs.items():
        # Both factors are means over samples, which makes a step N times larger.
        residuals = descend(model, setting, natural(structure, setting), eta / N, STEPS) - y
        error = float(np.abs(residuals - predicted).max() / norm)
        if run == "linearised":
            condition = structure.condition_number()
            tolerance = (
                TOLERANCE_FACTOR * N * np.finfo(x.dtype).eps * condition * max(1.0, float(np.linalg.norm(y)) / norm)
            )
            rows.append({"quantity": "linear_error", "value": error, "tolerance": tolerance})
            continue
        squared = np.square(residuals).sum(1) / norm**2
        rows += [
            {"quantity": "error", "value": error},
            {"quantity": "excess", "value": float(np.max((squared - worst)[1:]))},
            {"quantity": "looseness", "value": float(np.log(worst[-1]) / np.log(squared[-1]))},
        ]
        rows += [
            {"quantity": "decay", "value": float(residuals[1, i] / start[i]), "predicted": 1 - eta * h, "sample": i}
            for i, h in enumerate(leverage)
            if abs(start[i]) > norm / N
        ]
    return rows


def _claims(config: Config) -> list[Claim]:
    if not _cells(config):
        return []
    at = where(NAME)
    claims = [
        Claim(
            id="kfac-leverages",
            statement="With the activation patterns frozen, K-FAC decays every example by its own leverage, 1 − ηh_i.",
            source=f"{PAPER}, theorem 4 (theory file, claim 8, derived)",
            measured=f"Distance of the linearised network's residuals from (1 − ηh_i)^k r_i(0) over {STEPS} steps.",
            rule=Identity(),
            estimate=identities,
            expected="supported",
            reason="J F⁺ Jᵀ = I ∘ H where SSᵀ is invertible.",
            needs=where(NAME, width=config.swept_widths[0]),
            quantities=("linear_error",),
        ),
        Claim(
            id="kfac-bound",
            statement="Under K-FAC ‖r(k)‖² ≤ (1 − η/λ_max(XᵀX))^k ‖r(0)‖².",
            source=f"{PAPER}, theorem 4 (theory file, claim 7)",
            measured="Largest excess of ‖r(k)‖²/‖r(0)‖² over the bound at η = 1, at the largest width.",
            rule=Inequality(0.0, "less"),
            estimate=at_largest_width(by_seed),
            expected="supported",
            reason="1/λ_max is the smallest leverage that unit inputs can have.",
            needs=at,
            quantities=("excess",),
        ),
        Claim(
            id="kfac-bound-loose",
            statement="The worst-case rate of K-FAC is loose by more than a factor of two in the number of steps.",
            source=f"{PAPER}, theorem 4 (theory file, claim 7)",
            measured="log of the bound over log of the measured ‖r(k)‖²/‖r(0)‖² at the largest width.",
            rule=Inequality(0.5, "less"),
            estimate=at_largest_width(by_seed),
            expected="supported",
            reason="The leverages average d/n, and the square is not used.",
            needs=at,
            quantities=("looseness",),
        ),
    ]
    for activation, exponent in (("relu", -0.25), ("erf", -0.5)):
        if activation in config.activation:
            claims.append(
                Claim(
                    id=f"kfac-width-{activation}",
                    statement=f"On the {activation} network itself the distance from that law falls with the width.",
                    source=f"{PAPER}, theorem 4 (theory file, claim 8)",
                    measured="Slope of log distance against log m.",
                    rule=Inequality(-0.1, "less"),
                    estimate=slope_by_seed,
                    expected="supported",
                    reason=f"The change of J falls as m^({exponent:g}).",
                    assumptions=needs_several_widths,
                    needs=where(NAME, activation=activation),
                    quantities=("error",),
                )
            )
    return claims


PART = Part(NAME, _cells, _measure, _claims, seconds=lambda width: 0.05 + 0.25 * width / 16384)
