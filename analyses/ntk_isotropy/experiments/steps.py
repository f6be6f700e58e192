"""Actual parameter steps against the function-space prediction (claims 7, 8, 11), on the network and its linearisation.

The prediction holds the Jacobian at its initial value. The network recomputes it at every step, as the paper does, which
adds Newton-like contraction after the first step; the linearised network cannot differ from the prediction.
"""

import math
from collections.abc import Mapping
from functools import partial
from typing import Literal

import numpy as np
from jaxtyping import Float
from torch import nn

import curvlab
from analyses.claims import claim
from analyses.descent import Direction, flat, outputs
from analyses.ntk_isotropy.config import Config
from analyses.ntk_isotropy.descent import frozen, train
from analyses.ntk_isotropy.points import PAPER, base, experiment, page, seconds
from analyses.ntk_isotropy.setting import PUBLISHED, SHORT_OF_RANK, Setting, make
from curvlab import study, theory
from curvlab.nn import linearize
from curvlab.rows import Rows

STEPS = 2
STABILITY: Mapping[float, Literal["less", "greater"]] = {0.5: "less", 1.5: "less", 2.2: "greater"}
"""Values of αη whose stability is judged, and the side of 1 on which the residual's factor lies."""


def _points(config: Config) -> list[study.Point]:
    wanted: list[study.Point] = []
    for structure in [name for name in PUBLISHED if name in config.structures]:
        at = {"structure": structure, "scale": 1.0}
        wanted += [{**at, "width": width} for width in config.swept_widths]
        wanted += [{**at, "scale": scale} for scale in config.step_scales]
        wanted += [{**at, "activation": activation} for activation in config.other_activations if structure == "full"]
    return wanted


def _relative_change(after: Rows, before: Rows) -> float:
    """‖J_t − J_0‖_F/‖J_0‖_F, from traces of Gram matrices."""
    old = sum(float(layer.diagonal().sum()) for layer in before.layers)
    new = sum(float(layer.diagonal().sum()) for layer in after.layers)
    cross = float(after.gram(before).trace())
    change: float = max(new - 2 * cross + old, 0.0) ** 0.5 / old**0.5
    return change


def _half_mean_square(f: Float[np.ndarray, " T"], y: Float[np.ndarray, " T"]) -> float:
    """½ (f − y)² averaged over outputs and samples."""
    return float(0.5 * np.mean(np.square(f - y)))


def _measure(cell: study.Cell, context: study.Context[Config]) -> study.Observations:
    setting = Setting.of(cell, context.config)
    name, scale = str(cell["structure"]), float(cell["scale"])
    alpha, response = setting.alpha(name), setting.predicted_test_response(name)
    if alpha is None or response is None:
        return []
    eta = scale * theory.best_step(alpha)
    x_test, targets_test = setting.problem.test
    f, y = setting.initial.numpy(force=True), setting.targets.numpy(force=True)
    f_test, y_test = (v.numpy(force=True) for v in (outputs(setting.problem.model, x_test), flat(targets_test)))
    times = range(1, STEPS + 1)
    predicted = theory.predict_train(f, y, alpha, eta, times)
    predicted_test = theory.predict_test(f_test, f, y, alpha, response, eta, times)
    at_start = make(name).update(setting.rows)
    network = setting.network()
    runs: dict[str, tuple[nn.Module, Direction]] = {"network": (network, setting.natural(make(name)))}
    if int(cell["width"]) <= context.config.middle_width:
        runs["linearised"] = (linearize(setting.problem.model), frozen(at_start, setting))
    start = np.linalg.norm(f - y)
    tolerance = setting.tolerance(at_start.condition_number() * max(1.0, abs(1 - scale)) ** STEPS)
    short = name == "kfac" and not all(setting.full_rank(index) for index in range(setting.depth))
    initial = _half_mean_square(f_test, y_test)
    rows = [study.observed(loss, initial, run="network", step=0) for loss in ("test_loss", "test_loss_predicted")]
    for run, (model, direction) in runs.items():
        trained, tested, status = train(model, setting, eta, STEPS, direction)
        identity = {"tolerance": tolerance, **(study.outside(SHORT_OF_RANK) if short and run == "linearised" else {})}
        for t in range(STEPS):
            at = {"run": run, "step": t + 1, **status}
            off = np.linalg.norm(trained[t] - predicted[t]) / start
            off_test = np.linalg.norm(tested[t] - predicted_test[t]) / np.linalg.norm(predicted_test[t] - f_test)
            rows += [
                study.observed("residual", np.linalg.norm(trained[t] - y) / start, **at),
                study.observed("residual_predicted", abs(1 - scale) ** (t + 1), **at),
                study.observed(f"train_error_{run}", off, **at, **identity),
                study.observed(f"test_error_{run}", off_test, **at, **identity),
                study.observed("test_loss", _half_mean_square(tested[t], y_test), **at),
                study.observed("test_loss_predicted", _half_mean_square(predicted_test[t], y_test), **at),
            ]
        if run == "network":
            after = curvlab.jacobian(network, setting.inputs)
            moved = math.nan if status else _relative_change(after, setting.jacobian)
            rows.append(study.observed("jacobian_change", moved, run=run, **status))
    return rows


_first = partial(study.among, run="network", step=1)
"""The estimate from the first step of the network."""


def _claims(config: Config) -> list[study.Claim]:
    activation = base(config)["activation"]
    claims: list[study.Claim] = []
    for structure in PUBLISHED:
        if structure != "unit-wise":
            claims.append(_linear_training(structure))
        claims += _first_step(structure, {"structure": structure, "scale": 1.0, "activation": activation})
        claims += [_stability(structure, scale) for scale in STABILITY]
    return claims


def _slow(structure: str) -> bool:
    """Whether a structure approaches its limit so slowly in the width that nobody knows what to expect."""
    return structure in ("kfac", "unit-wise")


def _linear_training(structure: str) -> study.Claim:
    reason = "Without change of J the dynamics is that of the response."
    if structure == "kfac":
        reason += " Networks where a factor of a layer is short of rank on the samples are outside the assumptions and left out."
    return claim(
        f"linear-training-{structure}", page(f"{PAPER}, Theorem on dynamics", "claims 7 and 8"),
        study.Identity(("train_error_linearised", "test_error_linearised")),
        f"On the linearised network {structure} training follows f_0 + (1 − (1 − αη)^t)(y − f_0).",
        "Distance of training and test outputs from the prediction, every αη and step.",
        study.supported(reason), at={"structure": structure},
    )  # fmt: skip


def _first_step(structure: str, at: Mapping[str, object]) -> list[study.Claim]:
    expected = study.undecided if _slow(structure) else study.supported
    row = partial(claim, at=at)
    return [
        row(f"training-{structure}", page(f"{PAPER}, section 4", "claim 7"), study.Inequality("residual", "less", 0.1),
            f"One {structure} step at η = 1/α brings the training outputs of a wide network to the targets.",
            "‖f_1 − y‖/‖f_0 − y‖ after one real step at the largest width.",
            expected("The residual is left by the change of J, O(M^(−1/2)); the paper reports 0.04 at M = 4096 for exact "
                     "natural gradient and slow convergence in the width for K-FAC."),
            estimate=study.at_largest_width(_first(study.by_seed))),
        row(f"test-{structure}", page(f"{PAPER}, section 4", "claim 8"), study.Inequality("test_error_network", "less", 0.1),
            f"After one {structure} step the test outputs of a wide network are those predicted for {structure}.",
            "‖f_1(x') − prediction‖/‖prediction − f_0(x')‖ at the largest width.",
            expected("As for the training outputs."), estimate=study.at_largest_width(_first(study.by_seed))),
        row(f"convergence-{structure}", page(f"{PAPER}, Condition 2", "claim 11"),
            study.Equivalence("train_error_network", -0.5, 0.2),
            f"The {structure} step approaches its prediction like M^(−1/2).",
            "Slope of log ‖f_1 − prediction‖ against log width.",
            study.undecided("M^(−1/2) is an upper bound from the literature on the tangent kernel."),
            estimate=_first(study.slope_by_seed), assumptions=study.needs_several_widths),
        row(f"jacobian-{structure}", page(f"{PAPER}, Condition 2", "claim 11"),
            study.Inequality("jacobian_change", "less", -0.25),
            f"The relative change of J over {STEPS} {structure} steps falls at least like M^(−1/4) with the width.",
            "Slope of log ‖J_t − J_0‖_F/‖J_0‖_F against log width.",
            expected("The usual bound is M^(−1/2); for ReLU the patterns that flip add a slower part."),
            estimate=study.slope_by_seed, assumptions=study.needs_several_widths),
    ]  # fmt: skip


def _stability(structure: str, scale: float) -> study.Claim:
    side, expected = STABILITY[scale], study.undecided if scale > 2 or _slow(structure) else study.supported
    return claim(
        f"stability-{structure}-{scale:g}", page(f"{PAPER}, section 4: stable iff η < 2/α", "claim 7"),
        study.Inequality("residual", side, 1.0),
        f"At αη = {scale:g} the {structure} training residual {'shrinks' if side == 'less' else 'grows'}.",
        "‖f_1 − y‖/‖f_0 − y‖ after the first real step at the middle width.",
        expected(f"The predicted factor is {abs(1 - scale):g}; an earlier run at width 512 saw long first steps bent back by the "
                 "curvature of f."),
        at={"structure": structure, "scale": scale}, estimate=_first(study.by_seed),
    )  # fmt: skip


PARAMETER_STEPS = experiment(_points, name="steps", measure=_measure, claims=_claims, seconds=seconds(0.05, 0.8))
