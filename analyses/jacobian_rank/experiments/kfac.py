"""K-FAC on the two-layer network: every sample decays by its leverage (claims 7 and 8)."""

from itertools import product

import numpy as np

from analyses.claims import claim
from analyses.jacobian_rank.config import Config
from analyses.jacobian_rank.descent import descend
from analyses.jacobian_rank.points import BOTH, SYNTHETIC, experiment, page, seconds
from analyses.jacobian_rank.setting import Setting
from curvlab import fisher, study, theory
from curvlab.nn import linearize

ETA, STEPS = 1.0, 5


def _points(config: Config) -> list[study.Point]:
    if "kfac" not in config.structures or config.swept_widths == (0,):
        return []
    at = {"problem": SYNTHETIC, "similarity": 0.5}
    pairs = product(config.activation, config.swept_widths)
    return [{**at, "width": width, "activation": activation} for activation, width in pairs]


def _measure(cell: study.Cell, context: study.Context[Config]) -> study.Observations:
    setting = Setting.of(cell, context.config)
    x, y, start = (v.numpy(force=True) for v in (setting.inputs, setting.targets, setting.residual))
    leverage = theory.leverages(x)
    steps = range(STEPS + 1)
    predicted = theory.kfac_residual(leverage, ETA, steps, start)
    worst = theory.kfac_worst_rate(x, ETA) ** np.array(steps)
    norm = np.linalg.norm(start)
    structure = fisher.KFAC()
    rows = []
    runs = {"network": setting.network()}
    if int(cell["width"]) == context.config.swept_widths[0]:
        runs["linearised"] = linearize(setting.problem.model)
    for run, model in runs.items():
        # Both factors are means over samples, which makes a step N times larger.
        residuals = descend(setting, setting.natural(structure), ETA / len(x), STEPS, model) - y
        error = np.abs(residuals - predicted).max() / norm
        if run == "linearised":
            tolerance = setting.round_off(structure.condition_number())
            rows.append(study.observed("linear_error", error, tolerance=tolerance))
            continue
        squared = np.square(residuals).sum(1) / norm**2
        slope, _ = np.polyfit(1 - ETA * leverage, residuals[1] / start, 1, w=np.abs(start))
        rows += [
            study.observed("sample_slope", float(slope)),
            study.observed("error", error),
            study.observed("excess", np.max((squared - worst)[1:])),
            study.observed("looseness", np.log(worst[-1]) / np.log(squared[-1])),
        ]
        rows += [
            study.observed("decay", residuals[1, i] / start[i], predicted=1 - ETA * leverage[i], sample=i)
            for i in np.flatnonzero(np.abs(start) > norm / len(x))
        ]
    return rows


WIDTHS = {
    "relu": (-0.5, "O(√m) units flip, each changes an output by O(1/m), and what it adds depends on the side from which it comes."),
    "erf": (-1.0, "A unit adds O(m^(−3/2)) in second order of its move, with the unit's sign, so that m of them add up to O(1/m)."),
}  # fmt: skip
"""Exponent of the width with which a step's residuals leave the leverage law, by activation, and its derivation; the law holds
at every step anew, whatever the patterns are then."""


def _laws(activation: str, widest: int) -> list[study.Claim]:
    exponent, reason = WIDTHS[activation]
    return [
        claim(f"kfac-width-{activation}", page("theorem 4", "claim 8, derived"),
              study.Equivalence("error", exponent, 0.2, centre="mean"),
              f"On the {activation} network itself the distance from that law falls as m^({exponent:g}).",
              "Slope of log distance against log m.", study.supported(reason, explored=12), group="derived", given="kfac-leverages",
              at={"activation": activation}, estimate=study.slope_by_seed, assumptions=study.needs_several_widths),
        claim(f"kfac-samples-{activation}", page("theorem 4", "claim 8, derived"),
              study.Equivalence("sample_slope", 1.0, 0.1, centre="mean"),
              f"Sample by sample, r_i(1)/r_i(0) on the widest {activation} network is 1 − ηh_i.",
              "Slope of the one against the other over the samples, each weighted by r_i(0)².",
              study.supported("The law is that of the linearised network."), group="derived", given="kfac-leverages",
              at={"activation": activation, "width": widest}),
    ]  # fmt: skip


def _claims(config: Config) -> list[study.Claim]:
    widest = config.swept_widths[-1]
    return [
        claim("kfac-leverages", page("theorem 4", "claim 8, derived"), study.Identity("linear_error"),
              "With the activation patterns frozen, K-FAC decays every example by its own leverage, 1 − ηh_i.",
              f"Distance of the linearised network's residuals from (1 − ηh_i)^k r_i(0) over {STEPS} steps.",
              study.supported("J F⁺ Jᵀ = I ∘ H where SSᵀ is invertible."),
              group="derived", at={"width": config.swept_widths[0]}),
        claim("kfac-bound", page("theorem 4", "claim 7"), study.Always("excess", "less", 0.0),
              "Under K-FAC ‖r(k)‖² ≤ (1 − η/λ_max(XᵀX))^k ‖r(0)‖² at every step.",
              "Largest excess of ‖r(k)‖²/‖r(0)‖² over the bound at η = 1, at the largest width.",
              study.supported("1/λ_max is the smallest leverage that unit inputs can have."),
              group="paper", bound_from="the theorem", at={"width": widest}),
        claim("kfac-bound-loose", page("theorem 4", "claim 7"),
              study.Inequality("looseness", "less", 0.5, centre="geometric mean"),
              "The worst-case rate of K-FAC is loose by more than a factor of two in the number of steps.",
              "log of the bound over log of the measured ‖r(k)‖²/‖r(0)‖² at the largest width.",
              study.supported("The leverages average d/n, and the square is not used."),
              group="exploration", at={"width": widest}, estimate=study.geometric_by_seed),
        *(law for activation in config.activation for law in _laws(activation, widest)),
    ]  # fmt: skip


KFAC = experiment(_points, varies=BOTH, name="kfac", measure=_measure, claims=_claims, seconds=seconds(0.05, 0.25))
