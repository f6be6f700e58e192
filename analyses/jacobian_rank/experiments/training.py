"""Natural gradient on the two-layer network: stability of the Jacobian, rate, and movement (claims 2 to 4, 9, 10)."""

from collections.abc import Iterator, Mapping
from functools import lru_cache, partial

import numpy as np
import pandas as pd
import torch
from torch import Tensor

import curvlab
from analyses.claims import claim
from analyses.descent import length
from analyses.jacobian_rank.config import Config
from analyses.jacobian_rank.descent import contraction, descend, excess, moved, on_surface, unit_rank, watch
from analyses.jacobian_rank.points import (
    DRIFTS,
    experiment,
    own_and_few,
    page,
    second_largest,
    seconds,
)
from analyses.jacobian_rank.setting import BOUND_TOLERANCE, Setting
from curvlab import study, theory
from curvlab.fisher import Full
from curvlab.nn import TwoLayer, linearize

RATES = (0.1, 0.25, 0.5, 1.0)
"""η at the second largest width and on few data; other widths have `MIDDLE`."""
MIDDLE = 0.5
STEPS = 10
BALL_POINTS = 4
"""Random points on the surface of the ball of condition 2."""
SOLVED = 0.01
"""Part of ‖r‖² below which a step counts as having solved the problem."""


def _points(config: Config) -> list[study.Point]:
    def rates(point: study.Point) -> tuple[float, ...]:
        return RATES if point["data"] == "few" or point["width"] == second_largest(config) else (MIDDLE,)

    return [{**point, "eta": eta} for point in own_and_few(config) for eta in rates(point)]


@lru_cache(maxsize=1)
def _at_random(setting: Setting, seed: int) -> float:
    """Largest C_emp at random points of the surface; it does not depend on η, so that neighbouring cells share it."""
    source = study.generator(seed, "ball")

    def random() -> dict[str, Tensor]:
        return {
            name: torch.randn(shape, generator=source, dtype=torch.float64).to(setting.inputs)
            for name, shape in setting.jacobian.space.shapes.items()
        }

    return max(on_surface(setting, random()) for _ in range(BALL_POINTS))


def _measure(cell: study.Cell, context: study.Context[Config]) -> study.Observations:
    setting, smallest = Setting.of(cell, context.config), context.config.swept_widths[0]
    eta = float(cell["eta"])
    model = setting.network()
    path, seen = watch(setting, Full(), eta, STEPS, model=model)
    squared = setting.squared_residuals(path)
    constants: dict[str, float] = {}
    rows = [
        study.observed("change_frobenius", max(one.change_frobenius for one in seen)),
        study.observed("missing", max(one.deficiency for one in seen)),
    ]
    if setting.full_rank:
        constants["ball_random"] = _at_random(setting, int(cell["seed"]))
        constants["trajectory"] = setting.stability_constant(seen)
        rows += _movement(setting, model, eta)
    rows += [study.observed(f"constant_{name}", value) for name, value in constants.items()]
    above = excess(squared, theory.ngd_rate_bound(eta))
    for quantity, status in _coverage(constants, eta):
        rows.append(study.observed(quantity, above, **status))
    if isinstance(model, TwoLayer):
        rows += unit_rank(curvlab.jacobian(model, setting.inputs))
    if eta < 1:
        rows.append(study.observed("rate_ratio", contraction(squared) / theory.ngd_linear_ratio(eta)))
    rows += [study.observed("squared", float(value / squared[0]), step=step) for step, value in enumerate(squared)]
    if setting.full_rank and cell["data"] == "own" and int(cell["width"]) <= smallest:
        rows.append(_linearised(setting, eta))
    return rows


def _coverage(constants: Mapping[str, float], eta: float) -> Iterator[tuple[str, dict[str, str]]]:
    """Yield what the excess over the bound is called by the claims about runs on which theorem 1 speaks and by the others."""
    covered = bool(constants) and eta <= theory.largest_step(constants["trajectory"])
    silent = "condition 2 does not hold on the path with an allowed step; it would on wider networks (--widths)"
    yield "excess_on_path", {} if covered else study.outside(silent)
    yield "excess", study.outside("theorem 1 covers the run") if covered else {}


def _movement(setting: Setting, model: torch.nn.Module, eta: float) -> list[dict[str, object]]:
    """How far the parameters have moved, over the closed form and over the bound."""
    residual = setting.residual.numpy(force=True)
    far = length(moved(model, setting))
    closed = float(theory.movement(residual, setting.gram.numpy(force=True), eta, [STEPS])[0])
    bound = theory.movement_bound(float(np.linalg.norm(residual)), float(setting.eigenvalues[0]))
    return [study.observed("movement_ratio", far / closed), study.observed("movement_bound_ratio", far / bound)]


def _linearised(setting: Setting, eta: float) -> dict[str, object]:
    """Distance of the linearised network's residuals from (1 − η)^k r(0), relative to ‖r(0)‖."""
    steps = 3
    path = descend(setting, setting.natural(Full()), eta, steps, linearize(setting.problem.model))
    start = setting.residual.numpy(force=True)
    expected = np.multiply.outer((1 - eta) ** np.arange(steps + 1), start)
    error = np.abs(path - setting.targets.numpy(force=True) - expected).max() / np.linalg.norm(start)
    tolerance = setting.round_off(float(setting.eigenvalues[-1] / setting.eigenvalues[0]))
    return study.observed("linear_error", error, tolerance=tolerance)


def _power(table: pd.DataFrame) -> pd.DataFrame:
    """Estimate by the power of 1 − η that ‖r‖² contracts by, from its contraction over (1 − η)²."""
    return study.by_seed(table.assign(value=2 + np.log(table["value"]) / np.log1p(-table["eta"])))


SPECTRAL = {
    "relu": study.refuted(
        "Two samples flip together on a share O(1/m) of the units, and n of these outweigh the O(m^(−1/2)) of one sample "
        "until m is far above n².",
        explored=12,
    ),
    "erf": study.supported("All entries change alike, so the norms are proportional."),
}
"""What is expected of the spectral norm over the widths of the default run, by activation."""


def _drifts(activation: str) -> list[study.Claim]:
    exponent, reason = DRIFTS[activation]
    at = {"data": "own", "activation": activation, "eta": MIDDLE}
    slope = partial(claim, group="derived", at=at, estimate=study.slope_by_seed, assumptions=study.needs_several_widths)
    path = f"Slope of the logarithm of its largest value along the run at η = {MIDDLE:g} against log m."
    law = f"of the change of the Jacobian falls as m^({exponent:g}) with {activation}."
    return [
        slope(f"drift-{activation}", page("section 4", "claim 9, derived"),
              study.Equivalence("constant_trajectory", exponent, 0.05, centre="mean"),
              f"Along natural gradient the spectral norm over √λ_min(G(0)) {law}", path, SPECTRAL[activation]),
        slope(f"drift-frobenius-{activation}", page("section 4", "claim 9, derived"),
              study.Equivalence("change_frobenius", exponent, 0.05, centre="mean"),
              f"Along natural gradient the Frobenius norm {law}", path, study.supported(reason)),
        slope(f"drift-ball-{activation}", page("condition 2", "claims 2 and 9, derived"),
              study.Inequality("constant_ball_random", "less", exponent + 0.05, centre="mean"),
              "At random points of the ball of condition 2 the spectral norm over √λ_min(G(0)) of the change of the Jacobian falls "
              f"at least as fast as m^({exponent:g}) with {activation}.",
              "Slope of log C_emp, the largest at random points of the ball's surface, against log m; 0.05 for what is not yet the "
              "limit.",
              study.supported("The radius is O(1), so a random move changes every pre-activation by O(m^(−1/2)) or less.")),
    ]  # fmt: skip


def _rate(eta: float, config: Config) -> study.Claim:
    return claim(
        f"rate-squared-{eta:g}", page("theorem 1", "claim 4, derived"),
        study.Equivalence("rate_ratio", 2.0, 0.2, centre="mean"),
        f"At η = {eta:g} the squared residual of a wide network contracts by (1 − η)² per step, not by the bound's 1 − η.",
        "Logarithm of the geometric mean over the steps of ‖r(k+1)‖²/‖r(k)‖², over log(1 − η): 2 or 1; second largest width.",
        study.supported("The bound spends the square root on the change of J."),
        group="derived", at={"data": "own", "width": second_largest(config), "eta": eta}, estimate=_power,
    )  # fmt: skip


def _claims(config: Config) -> list[study.Claim]:
    slow = [eta for eta in RATES if eta < 1]
    own = {"data": "own", "eta": tuple(slow)}
    return [
        claim("rank-training", page("conditions 1 and 2", "claims 1 and 2"), study.Always("missing", "less", 0.0),
              "The Jacobian keeps full row rank along natural gradient.",
              "Share of the rows missing in the rank after any step.",
              study.supported("The Jacobian changes by less than its least singular value."), group="paper"),
        claim("rate-bound-path", page("theorem 1", "claim 3"), study.Always("excess_on_path", "less", BOUND_TOLERANCE),
              "Where condition 2 holds on the path and η is allowed, ‖u(k) − y‖² ≤ (1 − η)^k ‖u(0) − y‖² at every step.",
              "Largest excess of ‖r(k)‖²/‖r(0)‖² over (1 − η)^k; C is the largest C_emp along the run, which is all that the "
              "proof uses.",
              study.supported("It is a theorem."), group="paper", bound_from="the theorem, and round-off"),
        claim("rank-units-trained", page("condition 1", "claim 1, for unit-wise blocks"), study.Identity("unit_surprise"),
              "The row rank of a single ReLU unit is the number of samples on which it is active, after training, too.",
              "Largest difference between the two over some of the units, after the run.",
              study.supported("Rows of samples on which it is not active are zero, and inputs are in general position."),
              group="derived", at={"data": "own", "activation": "relu"}),
        claim("rate-beyond", page("theorem 1: the converse is not claimed", "claim 2"),
              study.Always("excess", "less", BOUND_TOLERANCE),
              "The bound of theorem 1 holds at η from 0.1 to 0.5 also where its conditions do not, at every step of every run.",
              "The same excess, for runs that the theorem does not cover.",
              study.undecided("The conditions are sufficient, not necessary."), group="exploration", at=own),
        claim("rate-linear", page("theorem 1 in the linear limit", "claim 4, derived"), study.Identity("linear_error"),
              "On the linearised network every residual contracts by 1 − η per step, and at η = 1 one step solves.",
              "Distance from (1 − η)^k r(0), relative to ‖r(0)‖.",
              study.supported("J J⁺ = I at full row rank."), group="self-check"),
        *(_rate(eta, config) for eta in slow),
        claim("rate-one", page("theorem 1", "claim 4, derived"),
              study.Inequality("squared", "less", SOLVED, centre="geometric mean"),
              f"At η = 1 one step leaves less than {SOLVED:g} of the squared residual of a wide network.",
              "‖r(1)‖²/‖r(0)‖², at the second largest width.",
              study.supported("(1 − η)² = 0, and what is left is of second order in a step of O(m^(−1/2)) per unit."),
              group="derived", at={"data": "own", "width": second_largest(config), "eta": 1.0},
              estimate=study.among(study.geometric_by_seed, step=1)),
        claim("movement-closed-form", page("condition 2", "claim 10, derived"),
              study.Equivalence("movement_ratio", 1.0, 0.05, centre="geometric mean"),
              "Natural gradient moves the parameters by √(r(0)ᵀG⁻¹r(0)) in all.",
              f"‖θ({STEPS}) − θ(0)‖ over (1 − (1 − η)^{STEPS}) √(r(0)ᵀG⁻¹r(0)), at the second largest width, η from 0.1 to 0.5.",
              study.supported("Every step moves along the same Jᵀ(JJᵀ)⁻¹r(0) as long as J stays."),
              group="derived", at={**own, "width": second_largest(config)}, estimate=study.geometric_by_seed),
        claim("movement-bound", page("condition 2", "claim 10"), study.Always("movement_bound_ratio", "less", 1.0),
              "The movement stays below ‖r(0)‖/√λ_min(G(0)).", "The movement over that bound.",
              study.supported("The residual is not along the least eigenvector."),
              group="derived", bound_from="the closed form, with all of the residual along the least eigenvector"),
        *(one for activation in config.activation for one in _drifts(activation)),
    ]  # fmt: skip


TRAINING = experiment(_points, varies=("initialisation", "draws"), name="training", measure=_measure, claims=_claims,
                      seconds=seconds(0.2, 0.5))  # fmt: skip
