"""Actual parameter steps against the function-space prediction (claims 7, 8, 11), on the network and its linearisation.

The prediction holds the Jacobian at its initial value. The network recomputes it at every step, as the paper does, which
adds Newton-like contraction after the first step; the linearised network cannot differ from the prediction.
"""

import math
from collections.abc import Mapping
from functools import partial

import numpy as np
import pandas as pd
from jaxtyping import Float
from torch import nn

import curvlab
from analyses.claims import claim
from analyses.descent import Direction, flat, outputs
from analyses.ntk_isotropy.config import Config
from analyses.ntk_isotropy.descent import frozen, train
from analyses.ntk_isotropy.points import LEFT, LEFT_FROM, PAPER, base, experiment, page, seconds
from analyses.ntk_isotropy.setting import PUBLISHED, SHORT_OF_RANK, Setting, make
from curvlab import study, theory
from curvlab.nn import linearize
from curvlab.rows import Rows
from curvlab.study.inference import Summary

STEPS = 2
HALF = 0.5
"""αη of which the first step is judged: larger steps are bent back by the curvature of f, of the order of (αη)² M^(−1/2)."""
LAWS = {"relu": -0.25, "erf": -0.5, "tanh": -0.5}
"""Slopes of the relative change of J against the width (derived)."""
README: Mapping[str, tuple[float, ...]] = {
    "numpy-train_loss": (0.134341, 2.03e-4, 1.35e-7),
    "jax-train_loss": (0.123769, 1.97e-4, 6.3e-8),
    "numpy-test_loss": (0.128435, 0.004228, 0.004011),
    "jax-test_loss": (0.130732, 0.00462, 0.00421),
}
"""Published losses after 0, 1 and 2 exact steps on MNIST 0 and 1, of one initialisation for each version of the code."""


def _points(config: Config) -> list[study.Point]:
    wanted: list[study.Point] = []
    for structure in [name for name in PUBLISHED if name in config.structures]:
        at = {"structure": structure, "scale": 1.0}
        wanted += [{**at, "width": width} for width in config.swept_widths]
        wanted += [{**at, "scale": scale} for scale in config.step_scales]
        if structure == "full":
            at_widths = [{**at, "width": width} for width in config.swept_widths]
            wanted += [{**point, "activation": name} for name in config.other_activations for point in at_widths]
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
    rows.append(study.observed("train_loss", _half_mean_square(f, y), run="network", step=0))
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
                study.observed("train_loss", _half_mean_square(trained[t], y), **at),
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
    left = LEFT * math.sqrt(4096 / (config.swept_widths[-1] or 4096))
    claims: list[study.Claim] = []
    for structure in PUBLISHED:
        if structure != "unit-wise":
            claims.append(_linear_training(structure))
        claims += _first_step(structure, left, {"structure": structure, "scale": 1.0, "activation": activation})
        claims.append(_contraction(structure))
    claims += [_change(name) for name in dict.fromkeys((activation, *config.other_activations)) if name in LAWS]
    if config.problem == "karakida-osawa":
        at = {"structure": "full", "scale": 1.0, "activation": "relu", "width": 4096, "depth": 3}
        claims += [
            _published(name, step, loss, at) for name, losses in README.items() for step, loss in enumerate(losses)
        ]
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
        study.supported(reason), group="self-check", at={"structure": structure},
    )  # fmt: skip


def _first_step(structure: str, left: float, at: Mapping[str, object]) -> list[study.Claim]:
    expected = study.undecided if _slow(structure) else study.supported
    row = partial(claim, at=at)
    widest = study.at_largest_width(_first(study.by_seed))
    return [
        row(f"training-{structure}", page(f"{PAPER}, section 4", "claim 7"),
            study.Inequality("residual", "less", round(left, 4), centre="geometric mean"),
            f"One {structure} step at η = 1/α brings the training outputs of a wide network to the targets.",
            "‖f_1 − y‖/‖f_0 − y‖ after one real step at the largest width.",
            expected("The residual is left by the change of J; the paper reports slow convergence in the width for K-FAC."),
            group="paper", estimate=widest, bound_from=f"{LEFT_FROM}, times √(4096/M)"),
        row(f"test-{structure}", page(f"{PAPER}, section 4", "claim 8"),
            study.Inequality("test_error_network", "less", 0.1, centre="geometric mean"),
            f"After one {structure} step the test outputs of a wide network are those predicted for {structure}.",
            "‖f_1(x') − prediction‖/‖prediction − f_0(x')‖ at the largest width.",
            expected("As for the training outputs."), group="paper", estimate=widest),
        row(f"convergence-{structure}", page(f"{PAPER}, Condition 2", "claim 11"),
            study.Inequality("train_error_network", "less", -0.5, centre="mean"),
            f"The {structure} step approaches its prediction at least as fast as M^(−1/2).",
            "Slope of log ‖f_1 − prediction‖ against log width.",
            expected("M^(−1/2) is the usual bound; the terms of the units have random signs and partly cancel.", explored=12),
            group="paper", bound_from="the usual bound for tangent kernels, O(M^(−1/2))", estimate=_first(study.slope_by_seed),
            assumptions=study.needs_several_widths),
        row(f"jacobian-{structure}", page(f"{PAPER}, Condition 2", "claim 11"),
            study.Inequality("jacobian_change", "less", 0.0, centre="mean"),
            f"The relative change of J over {STEPS} {structure} steps falls with the width.",
            "Slope of log ‖J_t − J_0‖_F/‖J_0‖_F against log width.",
            expected("It vanishes in the limit of infinite width."), group="paper", bound_from="Condition 2: the change vanishes",
            estimate=study.slope_by_seed, assumptions=study.needs_several_widths),
    ]  # fmt: skip


def _contraction(structure: str) -> study.Claim:
    expected = study.undecided if _slow(structure) else study.supported
    return claim(
        f"contraction-{structure}", page(f"{PAPER}, section 4", "claim 7"),
        study.Equivalence("residual", 1 - HALF, 0.1 * (1 - HALF), centre="geometric mean"),
        f"The first {structure} step at αη = {HALF:g} multiplies the training residual by 1 − αη.",
        "‖f_1 − y‖/‖f_0 − y‖ after one real step at the middle width.",
        expected("The distance from the prediction is of the order of (αη)² M^(−1/2) at most."), group="paper",
        at={"structure": structure, "scale": HALF}, estimate=_first(study.by_seed),
    )  # fmt: skip


def _change(activation: str) -> study.Claim:
    law = LAWS[activation]
    reason = "Pre-activations move by O(M^(−1/2))"
    reason += (
        ", and so does φ'."
        if law == -0.5
        else ": that share of the ReLU patterns flips, and its root is the change of J."
    )
    return claim(
        f"jacobian-law-{activation}", page("derived", "claim 11"),
        study.Equivalence("jacobian_change", law, 0.125, centre="mean"),
        f"With {activation} units the relative change of J over {STEPS} exact steps falls like M^({law:g}).",
        "Slope of log ‖J_t − J_0‖_F/‖J_0‖_F between the two largest widths, where the slower of two powers has outlived the other.",
        study.supported(reason, explored=12), group="derived",
        at={"structure": "full", "scale": 1.0, "activation": activation}, estimate=_slope_of_the_widest,
        assumptions=study.needs_several_widths, bound_from="half the distance between M^(−1/4) and M^(−1/2)",
    )  # fmt: skip


def _slope_of_the_widest(table: pd.DataFrame) -> pd.DataFrame:
    return study.slope_by_seed(table[table["width"].isin(sorted(set(table["width"]))[-2:])])


def _published(name: str, step: int, loss: float, at: Mapping[str, object]) -> study.Claim:
    code, quantity = name.split("-")
    return claim(
        f"published-{name}-{step}", f"{PAPER}, README of the published code", study.Identity(quantity, coarsest=math.log(2)),
        f"The {quantity.replace('_', ' ')} after {step} exact steps agrees with the {code} version's, {loss:g}.",
        "Log of the geometric mean over the published number, against the 95 % prediction interval of one more run.",
        study.supported("Data, network and step are the same; the initialisation is drawn anew."), group="paper",
        at=at, estimate=partial(_deviation, step=step, published=loss),
        bound_from="the spread of our own initialisations",
    )  # fmt: skip


def _deviation(table: pd.DataFrame, step: int, published: float) -> pd.DataFrame:
    """Estimate by the log of the geometric mean over a published number; the tolerance is a prediction interval's half."""
    table = table[(table["run"] == "network") & (table["step"] == step)]
    logs = Summary.of(np.log(table["value"].to_numpy(dtype=float) / published))
    return study.identities(table.assign(value=logs.mean, tolerance=logs.prediction(0.95)))


PARAMETER_STEPS = experiment(_points, name="steps", measure=_measure, claims=_claims, seconds=seconds(0.05, 0.8))
