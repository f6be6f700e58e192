"""K-FAC on the two-layer network: every sample decays by its leverage (claims 7 and 8)."""

from itertools import product

import numpy as np

from analyses.claims import claim
from analyses.jacobian_rank.config import Config
from analyses.jacobian_rank.descent import descend
from analyses.jacobian_rank.points import DRIFTS, PAPER, SYNTHETIC, experiment, page, seconds
from analyses.jacobian_rank.setting import Setting
from curvlab import fisher, study, theory
from curvlab.nn import linearize

STEPS = 5


def _points(config: Config) -> list[study.Point]:
    if "kfac" not in config.structures or config.swept_widths == (0,):
        return []
    at, pairs = {"problem": SYNTHETIC, "similarity": 0.5}, product(config.activation, config.swept_widths)
    return [{**at, "width": width, "activation": activation} for activation, width in pairs]


def _measure(cell: study.Cell, context: study.Context[Config]) -> study.Observations:
    setting = Setting.of(cell, context.config)
    x, y, start = (v.numpy(force=True) for v in (setting.inputs, setting.targets, setting.residual))
    leverage, N, eta, steps = theory.leverages(x), len(x), 1.0, range(STEPS + 1)
    predicted = theory.kfac_residual(leverage, eta, steps, start)
    worst = theory.kfac_worst_rate(x, eta) ** np.array(steps)
    norm = np.linalg.norm(start)
    structure = fisher.KFAC()
    rows = []
    runs = {"network": setting.network()}
    if int(cell["width"]) == context.config.swept_widths[0]:
        runs["linearised"] = linearize(setting.problem.model)
    for run, model in runs.items():
        # Both factors are means over samples, which makes a step N times larger.
        residuals = descend(setting, setting.natural(structure), eta / N, STEPS, model) - y
        error = np.abs(residuals - predicted).max() / norm
        if run == "linearised":
            tolerance = setting.round_off(structure.condition_number())
            rows.append(study.observed("linear_error", error, tolerance=tolerance))
            continue
        squared = np.square(residuals).sum(1) / norm**2
        rows += [
            study.observed("error", error),
            study.observed("excess", np.max((squared - worst)[1:])),
            study.observed("looseness", np.log(worst[-1]) / np.log(squared[-1])),
        ]
        rows += [
            study.observed("decay", residuals[1, i] / start[i], predicted=1 - eta * leverage[i], sample=i)
            for i in np.flatnonzero(np.abs(start) > norm / N)
        ]
    return rows


def _width(activation: str) -> study.Claim:
    exponent, _ = DRIFTS[activation]
    return claim(
        f"kfac-width-{activation}", page(f"{PAPER}, theorem 4", "claim 8"), study.Inequality("error", "less", -0.1),
        f"On the {activation} network itself the distance from that law falls with the width.",
        "Slope of log distance against log m.",
        study.supported(f"The change of J falls as m^({exponent:g})."), at={"activation": activation},
        estimate=study.slope_by_seed, assumptions=study.needs_several_widths,
    )  # fmt: skip


def _claims(config: Config) -> list[study.Claim]:
    return [
        claim("kfac-leverages", page(f"{PAPER}, theorem 4", "claim 8, derived"), study.Identity("linear_error"),
              "With the activation patterns frozen, K-FAC decays every example by its own leverage, 1 − ηh_i.",
              f"Distance of the linearised network's residuals from (1 − ηh_i)^k r_i(0) over {STEPS} steps.",
              study.supported("J F⁺ Jᵀ = I ∘ H where SSᵀ is invertible."), at={"width": config.swept_widths[0]}),
        claim("kfac-bound", page(f"{PAPER}, theorem 4", "claim 7"), study.Inequality("excess", "less", 0.0),
              "Under K-FAC ‖r(k)‖² ≤ (1 − η/λ_max(XᵀX))^k ‖r(0)‖².",
              "Largest excess of ‖r(k)‖²/‖r(0)‖² over the bound at η = 1, at the largest width.",
              study.supported("1/λ_max is the smallest leverage that unit inputs can have."),
              estimate=study.at_largest_width(study.by_seed)),
        claim("kfac-bound-loose", page(f"{PAPER}, theorem 4", "claim 7"), study.Inequality("looseness", "less", 0.5),
              "The worst-case rate of K-FAC is loose by more than a factor of two in the number of steps.",
              "log of the bound over log of the measured ‖r(k)‖²/‖r(0)‖² at the largest width.",
              study.supported("The leverages average d/n, and the square is not used."),
              estimate=study.at_largest_width(study.by_seed)),
        *map(_width, config.activation),
    ]  # fmt: skip


KFAC = experiment(_points, name="kfac", measure=_measure, claims=_claims, seconds=seconds(0.05, 0.25))
