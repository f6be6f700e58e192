"""Natural gradient on the two-layer network: stability of the Jacobian, rate, and movement (claims 2 to 4, 9, 10)."""

from collections.abc import Iterator, Mapping
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

import curvlab
from analyses.claims import claim
from analyses.descent import length
from analyses.jacobian_rank.config import Config
from analyses.jacobian_rank.descent import contraction, descend, displaced, excess, moved, unit_rank, watch
from analyses.jacobian_rank.points import DRIFTS, PAPER, experiment, own_and_easy, page, second_largest, seconds
from analyses.jacobian_rank.setting import BOUND_TOLERANCE, Setting
from curvlab import study, theory
from curvlab.fisher import Full
from curvlab.nn import TwoLayer, linearize

RATES = (0.1, 0.25, 0.5, 1.0)
"""η at the second largest width and on easy data; other widths have `MIDDLE`."""
MIDDLE = 0.5
STEPS = 10
BALL_POINTS = 4
"""Random points on the surface of the ball of condition 2."""


def _points(config: Config) -> list[study.Point]:
    def rates(point: study.Point) -> tuple[float, ...]:
        return RATES if point["data"] == "easy" or point["width"] == second_largest(config) else (MIDDLE,)

    return [{**point, "eta": eta} for point in own_and_easy(config) for eta in rates(point)]


def _on_surface(setting: Setting, direction: Mapping[str, Tensor]) -> float:
    """C_emp where a direction meets the surface of the ball of condition 2."""
    radius = theory.condition_radius(float(setting.residual.norm()), float(setting.eigenvalues[0]))
    rows = curvlab.jacobian(displaced(setting, radius, direction), setting.inputs)
    return setting.stability_constant([setting.inspect(rows)])


@lru_cache(maxsize=1)
def _at_random(setting: Setting, seed: int) -> float:
    """Largest C_emp at random points of the surface; it does not depend on η, so that neighbouring cells share it."""
    generator = torch.Generator().manual_seed(seed)

    def random() -> dict[str, Tensor]:
        return {
            name: torch.randn(shape, generator=generator, dtype=torch.float64).to(setting.inputs)
            for name, shape in setting.jacobian.space.shapes.items()
        }

    return max(_on_surface(setting, random()) for _ in range(BALL_POINTS))


def _measure(cell: study.Cell, context: study.Context[Config]) -> study.Observations:
    setting, smallest = Setting.of(cell, context.config), context.config.swept_widths[0]
    eta = float(cell["eta"])
    model = setting.network()
    path, seen = watch(setting, Full(), eta, STEPS, model=model)
    squared = setting.squared_residuals(path)
    constants: dict[str, float] = {}
    rows = [
        study.observed("change_frobenius", max(one.change_frobenius for one in seen)),
        study.observed("missing", max(one.deficiency for one in seen), tolerance=0.0),
    ]
    if setting.full_rank:
        constants["ball_random"] = _at_random(setting, int(cell["seed"]))
        constants["ball_trained"] = _on_surface(setting, moved(model, setting))
        constants["trajectory"] = setting.stability_constant(seen)
        rows += _movement(setting, model, eta)
    rows += [study.observed(f"constant_{name}", value) for name, value in constants.items()]
    above = excess(squared, theory.ngd_rate_bound(eta))
    for quantity, status in _coverage(constants, eta):
        rows.append(study.observed(quantity, above, tolerance=BOUND_TOLERANCE, **status))
    if isinstance(model, TwoLayer):
        rows.append(study.observed("unit_rank", unit_rank(curvlab.jacobian(model, setting.inputs))))
    if eta < 1:
        rows.append(study.observed("rate_ratio", contraction(squared) / theory.ngd_linear_ratio(eta)))
    rows += [study.observed("squared", float(value / squared[0]), step=step) for step, value in enumerate(squared)]
    if setting.full_rank and cell["data"] == "own" and int(cell["width"]) <= smallest:
        rows.append(_linearised(setting, eta))
    return rows


def _coverage(constants: Mapping[str, float], eta: float) -> Iterator[tuple[str, dict[str, str]]]:
    """Yield what the excess over the bound is called by every claim about it, and its status there."""
    in_ball = bool(constants) and eta <= theory.largest_step(max(constants.values()))
    on_path = bool(constants) and eta <= theory.largest_step(constants["trajectory"])
    cases = (("excess_in_ball", "in the ball", in_ball), ("excess_on_path", "on the path", on_path))
    for quantity, where, holds in cases:
        reason = f"condition 2 does not hold {where} with an allowed step; it would on wider networks (--widths)"
        yield quantity, {} if holds else study.outside(reason)
    yield "excess", study.outside("theorem 1 covers the run") if on_path else {}


def _movement(setting: Setting, model: torch.nn.Module, eta: float) -> list[dict[str, object]]:
    """How far the parameters have moved, over the closed form and over the bound."""
    residual, far = setting.residual.numpy(force=True), length(moved(model, setting))
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


def _bound(id_: str, where: str, measured: str, quantity: str) -> study.Claim:
    return claim(
        id_, page(f"{PAPER}, theorem 1", "claim 3"), study.Identity(quantity),
        f"Where condition 2 holds {where} and η is allowed, ‖u(k) − y‖² ≤ (1 − η)^k ‖u(0) − y‖² at every step.",
        f"Largest excess of ‖r(k)‖²/‖r(0)‖² over (1 − η)^k; C is the largest C_emp {measured}.",
        study.supported("It is a theorem."),
    )  # fmt: skip


def _slope(id_: str, norm: str, quantity: str, activation: str, expected: study.Expected) -> study.Claim:
    exponent, _ = DRIFTS[activation]
    return claim(
        f"{id_}-{activation}", page(f"{PAPER}, section 4", "claim 9, derived"), study.Equivalence(quantity, exponent, 0.05),
        f"Along natural gradient {norm} of the change of the Jacobian falls as m^({exponent:g}) with {activation}.",
        f"Slope of the logarithm of its largest value along the run at η = {MIDDLE:g} against log m.",
        expected, at={"data": "own", "activation": activation, "eta": MIDDLE}, estimate=study.slope_by_seed,
        assumptions=study.needs_several_widths,
    )  # fmt: skip


SPECTRAL = {
    "relu": study.refuted(
        "Two samples flip together on a share O(1/m) of the units, and n of these outweigh the O(m^(−1/2)) of one sample "
        "until m is far above n²."
    ),
    "erf": study.supported("All entries change alike, so the norms are proportional."),
}
"""What is expected of the spectral norm over the widths of the default run, by activation."""


def _drifts(activation: str) -> list[study.Claim]:
    exponent, reason = DRIFTS[activation]
    constant = "the spectral norm over √λ_min(G(0))"
    return [
        _slope("drift", constant, "constant_trajectory", activation, SPECTRAL[activation]),
        _slope("drift-frobenius", "the Frobenius norm", "change_frobenius", activation, study.supported(reason)),
        claim(f"drift-ball-{activation}", page(f"{PAPER}, condition 2", "claim 2"),
              study.Inequality("constant_ball_random", "less", exponent + 0.05),
              "At random points of the ball of condition 2 the change of the Jacobian falls at least as fast as "
              f"m^({exponent:g}) with {activation}.",
              "Slope of log C_emp, the largest at random points of the ball's surface, against log m.",
              study.supported("The radius is O(1), so a random move changes every pre-activation by O(m^(−1/2)) or less."),
              at={"data": "own", "activation": activation, "eta": MIDDLE}, estimate=study.slope_by_seed,
              assumptions=study.needs_several_widths),
    ]  # fmt: skip


def _claims(config: Config) -> list[study.Claim]:
    own = {"data": "own", "eta": (0.1, 0.25, 0.5)}
    return [
        claim("rank-training", page(f"{PAPER}, conditions 1 and 2", "claims 1 and 2"), study.Identity("missing"),
              "The Jacobian keeps full row rank along natural gradient.",
              "Share of the rows missing in the rank after any step.",
              study.supported("The Jacobian changes by less than its least singular value.")),
        _bound(
            "rate-bound",
            "in the ball",
            "at random points of the ball's surface, where the run would leave it, and along the run",
            "excess_in_ball",
        ),
        _bound(
            "rate-bound-path", "on the path", "along the run alone, which is all that the proof uses", "excess_on_path"
        ),
        claim("rank-units-trained", f"{PAPER}, condition 1, for unit-wise blocks (derived)",
              study.Inequality("unit_rank", "less", 0.9),
              "Single ReLU units lack row rank after training, too, where the whole network does not.",
              "Mean over units of the row rank of a unit's block, over the number of rows, after the run.",
              study.supported("Training flips few activation patterns."), at={"data": "own", "activation": "relu"}),
        claim("rate-beyond", page(f"{PAPER}, theorem 1: the converse is not claimed", "claim 2"),
              study.Equivalence("excess", 0.0, 1e-6),
              "The bound of theorem 1 holds at η from 0.1 to 0.5 also where its conditions do not.",
              "The same excess, for runs that the theorem does not cover, the largest of a seed.",
              study.undecided("The conditions are sufficient, not necessary."), at=own, estimate=study.worst_by_seed),
        claim("rate-linear", page(f"{PAPER}, theorem 1 in the linear limit", "claim 4, derived"), study.Identity("linear_error"),
              "On the linearised network every residual contracts by 1 − η per step, and at η = 1 one step solves.",
              "Distance from (1 − η)^k r(0), relative to ‖r(0)‖.",
              study.supported("J J⁺ = I at full row rank.")),
        claim("rate-squared", page(f"{PAPER}, theorem 1", "claim 4, derived"), study.Equivalence("rate_ratio", 1.0, 0.1),
              "The squared residual of a wide network contracts by (1 − η)² per step, not by the bound's 1 − η.",
              "Geometric mean over the steps of ‖r(k+1)‖²/‖r(k)‖², over (1 − η)², at the largest width and η = 0.5.",
              study.supported("The bound spends the square root on the change of J."), at={"data": "own", "eta": 0.5},
              estimate=study.at_largest_width(study.by_seed)),
        claim("movement-closed-form", page(f"{PAPER}, condition 2", "claim 10, derived"),
              study.Equivalence("movement_ratio", 1.0, 0.05),
              "Natural gradient moves the parameters by √(r(0)ᵀG⁻¹r(0)) in all.",
              f"‖θ({STEPS}) − θ(0)‖ over (1 − (1 − η)^{STEPS}) √(r(0)ᵀG⁻¹r(0)), at the second largest width.",
              study.supported("Every step moves along the same Jᵀ(JJᵀ)⁻¹r(0) as long as J stays."),
              at={**own, "width": second_largest(config)}),
        claim("movement-bound", page(f"{PAPER}, condition 2", "claim 10"), study.Inequality("movement_bound_ratio", "less", 1.0),
              "The movement stays below ‖r(0)‖/√λ_min(G(0)).",
              "The movement over that bound, the largest of a seed.",
              study.supported("The residual is not along the least eigenvector."), estimate=study.worst_by_seed),
        *(claim for activation in config.activation for claim in _drifts(activation)),
    ]  # fmt: skip


TRAINING = experiment(_points, name="training", measure=_measure, claims=_claims, seconds=seconds(0.2, 0.5))
