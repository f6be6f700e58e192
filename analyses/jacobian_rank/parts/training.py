"""Natural gradient on the two-layer network: stability of the Jacobian, rate, and movement (claims 2 to 4, 9, 10)."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache, partial

import numpy as np
import pandas as pd
import torch
from torch import Tensor

import curvlab
from analyses.estimates import (
    at_largest_width,
    by_seed,
    identities,
    needs_several_widths,
    slope_by_seed,
    worst_by_seed,
)
from analyses.jacobian_rank.config import Config
from analyses.jacobian_rank.descent import (
    Point,
    contraction,
    descend,
    displaced,
    excess,
    follow,
    inspect,
    movement,
    natural,
    squared_residuals,
    unit_rank,
)
from analyses.jacobian_rank.part import PAPER, SYNTHETIC, Part, cells_of
from analyses.jacobian_rank.setting import Setting, setting_of
from analyses.part import TOLERANCE_FACTOR, Expectation, Observations, where
from curvlab import theory
from curvlab.fisher import Full
from curvlab.nn import TwoLayer, linearize
from curvlab.study import Cell, Claim, Equivalence, Identity, Inequality

NAME = "training"
RATES = (0.1, 0.25, 0.5, 1.0)
"""η at the second largest width and on easy data; other widths have `MIDDLE`."""
MIDDLE = 0.5
STEPS = 10
BALL_POINTS = 4
"""Random points on the surface of the ball of condition 2."""
BOUND_TOLERANCE = 1e-9
EASY: dict[str, object] = {"problem": SYNTHETIC, "similarity": 0.0, "samples": 6}
"""Few random samples, for which condition 2 holds at widths that fit into memory."""


def _rate_width(config: Config) -> int:
    return config.swept_widths[-2:][0]


def _cells(config: Config) -> list[Cell]:
    points: list[dict[str, object]] = [
        {"data": "own", "width": width, "activation": activation, "eta": eta}
        for activation in config.activation
        for width in config.swept_widths
        for eta in (RATES if width == _rate_width(config) else (MIDDLE,))
    ]
    if config.swept_widths != (0,):
        points += [
            {**EASY, "data": "easy", "width": config.swept_widths[-1], "activation": activation, "eta": eta}
            for activation in config.activation
            for eta in RATES
        ]
    return cells_of(NAME, config, points)


def _on_surface(setting: Setting, direction: Mapping[str, Tensor]) -> float:
    """C_emp where a direction meets the surface of the ball of condition 2."""
    smallest = float(setting.eigenvalues[0])
    radius = theory.condition_radius(float(setting.residual.norm()), smallest)
    rows = curvlab.jacobian(displaced(setting, radius, direction), setting.inputs)
    return theory.stability_constant(inspect(rows, setting).change, smallest)


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


def _trained(setting: Setting, model: torch.nn.Module) -> dict[str, Tensor]:
    """The move of training."""
    start, end = (dict(each.named_parameters()) for each in (setting.problem.model, model))
    return {name: (end[name] - start[name]).detach() for name in setting.jacobian.space.shapes}


def _measure(cell: Cell, config: Config) -> Observations:
    setting = setting_of(cell, config)
    eta = float(cell["eta"])
    model = copy.deepcopy(setting.problem.model)
    structure = Full()
    path, points = follow(
        model, setting, structure, natural(structure, setting), eta, STEPS, partial(inspect, setting=setting)
    )
    squared = squared_residuals(path, setting)
    constants = _constants(setting, model, points, int(cell["seed"])) if setting.full_rank else {}
    above = excess(squared, theory.ngd_rate_bound(eta))
    rows: list[dict[str, object]] = [
        *({"quantity": f"constant_{name}", "value": value} for name, value in constants.items()),
        {"quantity": _coverage(constants, eta), "value": above, "tolerance": BOUND_TOLERANCE},
        {"quantity": "change_frobenius", "value": max(point.change_frobenius for point in points)},
        {"quantity": "missing", "value": max(point.deficiency for point in points), "tolerance": 0.0},
        *(_movement(setting, model, eta) if setting.full_rank else []),
    ]
    if isinstance(model, TwoLayer):
        rows.append({"quantity": "unit_rank", "value": unit_rank(curvlab.jacobian(model, setting.inputs))})
    if eta < 1:
        rows.append({"quantity": "rate_ratio", "value": contraction(squared) / theory.ngd_linear_ratio(eta)})
    rows += [
        {"quantity": "squared", "value": float(value / squared[0]), "step": step} for step, value in enumerate(squared)
    ]
    if setting.full_rank and cell["data"] == "own" and int(cell["width"]) <= config.swept_widths[0]:
        rows.append(_linearised(setting, eta))
    return rows


def _constants(setting: Setting, trained: torch.nn.Module, points: list[Point], seed: int) -> dict[str, float]:
    """C_emp along the run, and at points of the ball's surface."""
    return {
        "ball_random": _at_random(setting, seed),
        "ball_trained": _on_surface(setting, _trained(setting, trained)),
        "trajectory": theory.stability_constant(max(point.change for point in points), float(setting.eigenvalues[0])),
    }


def _coverage(constants: Mapping[str, float], eta: float) -> str:
    """Name the quantity that the excess over the bound is, by where condition 2 holds with an allowed step."""
    if constants and eta <= theory.largest_step(max(constants.values())):
        return "excess_in_ball"
    if constants and eta <= theory.largest_step(constants["trajectory"]):
        return "excess_on_path"
    return "excess_uncovered"


def _movement(setting: Setting, model: torch.nn.Module, eta: float) -> list[dict[str, object]]:
    """How far the parameters have moved, over the closed form and over the bound."""
    residual, moved = setting.residual.numpy(force=True), movement(model, setting)
    closed = float(theory.movement(residual, setting.gram.numpy(force=True), eta, [STEPS])[0])
    bound = theory.movement_bound(float(np.linalg.norm(residual)), float(setting.eigenvalues[0]))
    return [
        {"quantity": "movement_ratio", "value": moved / closed},
        {"quantity": "movement_bound_ratio", "value": moved / bound},
    ]


def _linearised(setting: Setting, eta: float) -> dict[str, object]:
    """Distance of the linearised network's residuals from (1 − η)^k r(0), relative to ‖r(0)‖."""
    steps = 3
    path = descend(linearize(setting.problem.model), setting, natural(Full(), setting), eta, steps)
    start = setting.residual.numpy(force=True)
    expected = np.multiply.outer((1 - eta) ** np.arange(steps + 1), start)
    error = np.abs(path - setting.targets.numpy(force=True) - expected).max() / np.linalg.norm(start)
    condition = float(setting.eigenvalues[-1] / setting.eigenvalues[0])
    scale = max(1.0, float(setting.targets.norm()) / float(np.linalg.norm(start)))
    tolerance = TOLERANCE_FACTOR * len(start) * np.finfo(path.dtype).eps * condition * scale
    return {"quantity": "linear_error", "value": float(error), "tolerance": tolerance}


def _only_covered(table: pd.DataFrame) -> str | None:
    if set(table["quantity"]) & {"excess_in_ball", "excess_on_path"}:
        return None
    return "No run satisfies the condition with a step that the theorem allows; wider networks would (--widths)."


COVERAGE = (
    ("rate-bound", "in the ball", "at random points of the ball's surface, where the run would leave it, and along the run",
     ("excess_in_ball",)),
    ("rate-bound-path", "on the path", "along the run alone, which is all that the proof uses",
     ("excess_in_ball", "excess_on_path")),
)  # fmt: skip
"""Where condition 2 is checked, in words, and the runs that satisfy it with an allowed step."""


def _bound_claim(id_: str, where_: str, measured: str, quantities: tuple[str, ...]) -> Claim:
    return Claim(
        id=id_,
        statement=f"Where condition 2 holds {where_} and η is allowed, ‖u(k) − y‖² ≤ (1 − η)^k ‖u(0) − y‖² at every step.",
        source=f"{PAPER}, theorem 1 (theory file, claim 3)",
        measured=f"Largest excess of ‖r(k)‖²/‖r(0)‖² over (1 − η)^k; C is the largest C_emp {measured}.",
        rule=Identity(),
        estimate=identities,
        expected="supported",
        reason="It is a theorem.",
        assumptions=_only_covered,
        needs=where(NAME),
        quantities=quantities,
    )


@dataclass(frozen=True)
class Drift:
    """How the change of the Jacobian depends on the width, for an activation.

    Attributes:
        exponent: of m, derived.
        reason: its derivation in a sentence.
        spectral: what is expected of the spectral norm over the widths of the default run, and why.
    """

    exponent: float
    reason: str
    spectral: tuple[Expectation, str]


DRIFTS = {
    "relu": Drift(
        -0.25,
        "A share O(m^(−1/2)) of a sample's activation patterns flips, each flip changing an entry of size m^(−1/2).",
        (
            "refuted",
            "Two samples flip together on a share O(1/m) of the units, and n of these outweigh the O(m^(−1/2)) of one sample "
            "until m is far above n².",
        ),
    ),
    "erf": Drift(
        -0.5,
        "Every pre-activation moves by O(m^(−1/2)), and φ' with it.",
        ("supported", "All entries change alike, so the norms are proportional."),
    ),
}


def _unit_claims() -> list[Claim]:
    return [
        Claim(
            id="rank-units-trained",
            statement="Single ReLU units lack row rank after training, too, where the whole network does not.",
            source=f"{PAPER}, condition 1, for unit-wise blocks (derived)",
            measured="Mean over units of the row rank of a unit's block, over the number of rows, after the run.",
            rule=Inequality(0.9, "less"),
            estimate=by_seed,
            expected="supported",
            reason="Training flips few activation patterns.",
            needs=where(NAME, data="own", activation="relu"),
            quantities=("unit_rank",),
        )
    ]


def _drift_claims(activation: str, drift: Drift) -> list[Claim]:
    def slope(id_: str, norm: str, quantity: str, expected: Expectation, reason: str) -> Claim:
        return Claim(
            id=id_,
            statement=f"Along natural gradient {norm} of the change of the Jacobian falls as m^({drift.exponent:g}) with "
            f"{activation}.",
            source=f"{PAPER}, section 4 (theory file, claim 9, derived)",
            measured=f"Slope of the logarithm of its largest value along the run at η = {MIDDLE:g} against log m.",
            rule=Equivalence(drift.exponent, 0.05),
            estimate=slope_by_seed,
            expected=expected,
            reason=reason,
            assumptions=needs_several_widths,
            needs=where(NAME, data="own", activation=activation, eta=MIDDLE),
            quantities=(quantity,),
        )

    ball = Claim(
        id=f"drift-ball-{activation}",
        statement=f"At random points of the ball of condition 2 the change of the Jacobian falls at least as fast as "
        f"m^({drift.exponent:g}) with {activation}.",
        source=f"{PAPER}, condition 2 (theory file, claim 2)",
        measured="Slope of log C_emp, the largest at random points of the ball's surface, against log m.",
        rule=Inequality(drift.exponent + 0.05, "less"),
        estimate=slope_by_seed,
        expected="supported",
        reason="The radius is O(1), so a random move changes every pre-activation by O(m^(−1/2)) or less.",
        assumptions=needs_several_widths,
        needs=where(NAME, data="own", activation=activation, eta=MIDDLE),
        quantities=("constant_ball_random",),
    )
    constant = "the spectral norm over √λ_min(G(0))"
    return [
        slope(f"drift-{activation}", constant, "constant_trajectory", *drift.spectral),
        slope(f"drift-frobenius-{activation}", "the Frobenius norm", "change_frobenius", "supported", drift.reason),
        ball,
    ]


def _claims(config: Config) -> list[Claim]:
    claims = [
        Claim(
            id="rank-training",
            statement="The Jacobian keeps full row rank along natural gradient.",
            source=f"{PAPER}, conditions 1 and 2 (theory file, claims 1 and 2)",
            measured="Share of the rows missing in the rank after any step.",
            rule=Identity(),
            estimate=identities,
            expected="supported",
            reason="The Jacobian changes by less than its least singular value.",
            needs=where(NAME),
            quantities=("missing",),
        ),
        *(_bound_claim(*which) for which in COVERAGE),
        *(_unit_claims() if "relu" in config.activation else []),
        Claim(
            id="rate-beyond",
            statement="The bound of theorem 1 holds at η from 0.1 to 0.5 also where its conditions do not.",
            source=f"{PAPER}, theorem 1: the converse is not claimed (theory file, claim 2)",
            measured="The same excess, for runs that the theorem does not cover, the largest of a seed.",
            rule=Equivalence(0.0, 1e-6),
            estimate=worst_by_seed,
            expected="open",
            reason="The conditions are sufficient, not necessary.",
            needs=where(NAME, data="own", eta=(0.1, 0.25, 0.5)),
            quantities=("excess_uncovered",),
        ),
        Claim(
            id="rate-linear",
            statement="On the linearised network every residual contracts by 1 − η per step, and at η = 1 one step solves.",
            source=f"{PAPER}, theorem 1 in the linear limit (theory file, claim 4, derived)",
            measured="Distance from (1 − η)^k r(0), relative to ‖r(0)‖.",
            rule=Identity(),
            estimate=identities,
            expected="supported",
            reason="J J⁺ = I at full row rank.",
            needs=where(NAME),
            quantities=("linear_error",),
        ),
        Claim(
            id="rate-squared",
            statement="The squared residual of a wide network contracts by (1 − η)² per step, not by the bound's 1 − η.",
            source=f"{PAPER}, theorem 1 (theory file, claim 4, derived)",
            measured="Geometric mean over the steps of ‖r(k+1)‖²/‖r(k)‖², over (1 − η)², at the largest width and η = 0.5.",
            rule=Equivalence(1.0, 0.1),
            estimate=at_largest_width(by_seed),
            expected="supported",
            reason="The bound spends the square root on the change of J.",
            needs=where(NAME, data="own", eta=0.5),
            quantities=("rate_ratio",),
        ),
        Claim(
            id="movement-closed-form",
            statement="Natural gradient moves the parameters by √(r(0)ᵀG⁻¹r(0)) in all.",
            source=f"{PAPER}, condition 2 (theory file, claim 10, derived)",
            measured=f"‖θ({STEPS}) − θ(0)‖ over (1 − (1 − η)^{STEPS}) √(r(0)ᵀG⁻¹r(0)), at the second largest width.",
            rule=Equivalence(1.0, 0.05),
            estimate=by_seed,
            expected="supported",
            reason="Every step moves along the same Jᵀ(JJᵀ)⁻¹r(0) as long as J stays.",
            needs=where(NAME, data="own", eta=(0.1, 0.25, 0.5), width=_rate_width(config)),
            quantities=("movement_ratio",),
        ),
        Claim(
            id="movement-bound",
            statement="The movement stays below ‖r(0)‖/√λ_min(G(0)).",
            source=f"{PAPER}, condition 2 (theory file, claim 10)",
            measured="The movement over that bound, the largest of a seed.",
            rule=Inequality(1.0, "less"),
            estimate=worst_by_seed,
            expected="supported",
            reason="The residual is not along the least eigenvector.",
            needs=where(NAME),
            quantities=("movement_bound_ratio",),
        ),
    ]
    for activation in config.activation:
        claims += _drift_claims(activation, DRIFTS[activation])
    return claims


PART = Part(NAME, _cells, _measure, _claims, seconds=lambda width: 0.2 + 0.5 * width / 16384)
