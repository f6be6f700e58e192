"""Actual parameter steps against the function-space prediction (claims 7, 8, 11), on the network and its linearisation.

The prediction holds the Jacobian at its initial value. The network recomputes it at every step, as the paper does, which
adds Newton-like contraction after the first step; the linearised network cannot differ from the prediction.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Literal

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor, nn

import curvlab
from analyses.estimates import at_largest_width, by_seed, identities, needs_several_widths, slope_by_seed
from analyses.ntk_isotropy.config import Config
from analyses.ntk_isotropy.part import PAPER, Part, cells_of
from analyses.ntk_isotropy.setting import Setting, flat, make, setting_of
from analyses.part import TOLERANCE_FACTOR, Observations, where
from curvlab import theory
from curvlab.fisher import Structure
from curvlab.nn import linearize
from curvlab.rows import Rows
from curvlab.study import Cell, Claim, Equivalence, Identity, Inequality

NAME = "steps"
STRUCTURES = ("full", "block-diagonal", "block-tridiagonal", "kfac", "unit-wise")
STEPS = 2
STABILITY: Mapping[float, Literal["less", "greater"]] = {0.5: "less", 1.5: "less", 2.2: "greater"}
"""Values of αη whose stability is judged, and the side of 1 on which the residual's factor lies."""


SHORT_OF_RANK = (
    "Networks where a factor of a layer is short of rank on the samples are outside the assumptions and left out."
)

Direction = Callable[[nn.Module, Tensor], Mapping[str, Tensor]]
"""The direction to step in, given the network and ∂L/∂f."""


def _cells(config: Config) -> list[Cell]:
    points: list[Mapping[str, object]] = []
    for structure in STRUCTURES:
        if structure not in config.structures:
            continue
        at = {"structure": structure, "scale": 1.0}
        points += [{**at, "width": width} for width in config.swept_widths]
        points += [{**at, "scale": scale} for scale in config.step_scales]
        points += [{**at, "activation": activation} for activation in config.other_activations if structure == "full"]
    return cells_of(NAME, config, points)


def move(model: nn.Module, step: Mapping[str, Tensor], eta: float) -> None:
    """Take the step `θ ← θ − η step`."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.sub_(eta * step[name])


def outputs(model: nn.Module, inputs: Tensor) -> Float[Tensor, " R"]:
    """Outputs in row order."""
    with torch.no_grad():
        return flat(model(inputs))


def train(
    model: nn.Module,
    setting: Setting,
    eta: float,
    steps: int,
    direction: Direction,
) -> tuple[Float[np.ndarray, "S R"], Float[np.ndarray, "S T"]]:
    """Take real parameter steps and return training and test outputs after each."""
    x, x_test = setting.inputs, setting.problem.test[0]
    y = flat(setting.targets)
    trained, tested = [], []
    current = outputs(model, x)
    for _ in range(steps):
        move(model, direction(model, (current - y) / setting.samples), eta)
        current = outputs(model, x)
        trained.append(current.numpy(force=True))
        tested.append(outputs(model, x_test).numpy(force=True))
    return np.stack(trained), np.stack(tested)


def natural(structure: Structure, setting: Setting) -> Direction:
    """Return the undamped natural gradient with rows of the present parameters."""

    def direction(model: nn.Module, u: Float[Tensor, " R"]) -> Mapping[str, Tensor]:
        structure.update(curvlab.sqrt_fisher(model, setting.problem.loss, setting.inputs, setting.targets))
        return structure.lift(structure.rows.dual(u), 0.0)

    return direction


def frozen(structure: Structure) -> Direction:
    """Return the undamped natural gradient with the rows that the structure holds."""
    return lambda _, u: structure.lift(structure.rows.dual(u), 0.0)


def relative_change(after: Rows, before: Rows) -> float:
    """‖J_t − J_0‖_F/‖J_0‖_F, from traces of Gram matrices."""
    old = sum(float(layer.diagonal().sum()) for layer in before.layers)
    new = sum(float(layer.diagonal().sum()) for layer in after.layers)
    cross = float(after.gram(before).trace())
    change: float = max(new - 2 * cross + old, 0.0) ** 0.5 / old**0.5
    return change


def _measure(cell: Cell, config: Config) -> Observations:
    setting = setting_of(cell, config)
    name, scale = str(cell["structure"]), float(cell["scale"])
    alpha = setting.alpha(name)
    response = setting.predicted_test_response(name)
    if alpha is None or response is None:
        return []
    eta = scale * theory.best_step(alpha)
    f, y, f_test = (v.numpy(force=True) for v in (setting.initial, flat(setting.targets), setting.initial_test))
    times = range(1, STEPS + 1)
    predicted = theory.predict_train(f, y, alpha, eta, times)
    predicted_test = theory.predict_test(f_test, f, y, alpha, response, eta, times)
    at_start = make(name, setting.depth).update(setting.rows)
    network = copy.deepcopy(setting.problem.model)
    runs: dict[str, tuple[nn.Module, Direction]] = {"network": (network, natural(make(name, setting.depth), setting))}
    if int(cell["width"]) <= config.middle_width:
        runs["linearised"] = (linearize(setting.problem.model), frozen(at_start))
    y_test = flat(setting.problem.test[1]).numpy(force=True)
    start = np.linalg.norm(f - y)
    growth = max(1.0, abs(1 - scale)) ** STEPS
    tolerance = (
        TOLERANCE_FACTOR * len(f) * torch.finfo(setting.initial.dtype).eps * at_start.condition_number() * growth
    )
    short = name == "kfac" and not all(setting.full_rank(index) for index in range(setting.depth))
    initial_loss = _half_mean_square(f_test, y_test)
    rows: list[dict[str, object]] = [
        {"quantity": quantity, "value": initial_loss, "run": "network", "step": 0}
        for quantity in ("test_loss", "test_loss_predicted")
    ]
    for run, (model, direction) in runs.items():
        trained, tested = train(model, setting, eta, STEPS, direction)
        kept = f"{run}_short_of_rank" if short and run == "linearised" else run
        for t in range(STEPS):
            at = {"run": run, "step": t + 1}
            finite = np.isfinite(trained[t]).all() and np.isfinite(tested[t]).all()
            if not finite:
                rows.append({"quantity": "diverged", "value": 1.0, "status": "diverged", **at})
                break
            off = np.linalg.norm(trained[t] - predicted[t]) / start
            off_test = np.linalg.norm(tested[t] - predicted_test[t]) / np.linalg.norm(predicted_test[t] - f_test)
            rows += [
                {"quantity": "residual", "value": float(np.linalg.norm(trained[t] - y) / start), **at},
                {"quantity": "residual_predicted", "value": abs(1 - scale) ** (t + 1), **at},
                {"quantity": f"train_error_{kept}", "value": float(off), "tolerance": tolerance, **at},
                {"quantity": f"test_error_{kept}", "value": float(off_test), "tolerance": tolerance, **at},
                {"quantity": "test_loss", "value": _half_mean_square(tested[t], y_test), **at},
                {"quantity": "test_loss_predicted", "value": _half_mean_square(predicted_test[t], y_test), **at},
            ]
        if run == "network" and finite:
            moved = curvlab.jacobian(network, setting.inputs)
            rows.append({"quantity": "jacobian_change", "value": relative_change(moved, setting.jacobian), "run": run})
    return rows


def _half_mean_square(f: Float[np.ndarray, " T"], y: Float[np.ndarray, " T"]) -> float:
    """½ (f − y)² averaged over outputs and samples."""
    return float(0.5 * np.mean(np.square(f - y)))


def _first(estimate: Callable[[pd.DataFrame], pd.DataFrame]) -> Callable[[pd.DataFrame], pd.DataFrame]:
    """Return the estimate from the first step of the network."""
    return lambda table: estimate(table[(table["run"] == "network") & (table["step"] == 1)])


def _claims(config: Config) -> list[Claim]:
    claims: list[Claim] = []
    for structure in STRUCTURES:
        if structure not in config.structures:
            continue
        isotropic = structure != "unit-wise"
        one = where(NAME, structure=structure, scale=1.0, activation=config.activation)
        if isotropic:
            claims.append(
                Claim(
                    id=f"linear-training-{structure}",
                    statement=f"On the linearised network {structure} training follows f_0 + (1 − (1 − αη)^t)(y − f_0).",
                    source=f"{PAPER}, Theorem on dynamics (theory file, claims 7 and 8)",
                    measured="Distance of training and test outputs from the prediction, every αη and step.",
                    rule=Identity(),
                    estimate=identities,
                    expected="supported",
                    reason="Without change of J the dynamics is that of the response."
                    + (f" {SHORT_OF_RANK}" if structure == "kfac" else ""),
                    needs=where(NAME, structure=structure),
                    quantities=("train_error_linearised", "test_error_linearised"),
                )
            )
        claims += [
            Claim(
                id=f"training-{structure}",
                statement=f"One {structure} step at η = 1/α brings the training outputs of a wide network to the targets.",
                source=f"{PAPER}, section 4 (theory file, claim 7)",
                measured="‖f_1 − y‖/‖f_0 − y‖ after one real step at the largest width.",
                rule=Inequality(0.1, "less"),
                estimate=at_largest_width(_first(by_seed)),
                expected="open" if structure in ("kfac", "unit-wise") else "supported",
                reason="The residual is left by the change of J, O(M^(−1/2)); the paper reports 0.04 at M = 4096 for exact "
                "natural gradient and slow convergence in the width for K-FAC.",
                needs=one,
                quantities=("residual",),
            ),
            Claim(
                id=f"test-{structure}",
                statement=f"After one {structure} step the test outputs of a wide network are those predicted for {structure}.",
                source=f"{PAPER}, section 4 (theory file, claim 8)",
                measured="‖f_1(x') − prediction‖/‖prediction − f_0(x')‖ at the largest width.",
                rule=Inequality(0.1, "less"),
                estimate=at_largest_width(_first(by_seed)),
                expected="open" if structure in ("kfac", "unit-wise") else "supported",
                reason="As for the training outputs.",
                needs=one,
                quantities=("test_error_network",),
            ),
            Claim(
                id=f"convergence-{structure}",
                statement=f"The {structure} step approaches its prediction like M^(−1/2).",
                source=f"{PAPER}, Condition 2 (theory file, claim 11)",
                measured="Slope of log ‖f_1 − prediction‖ against log width.",
                rule=Equivalence(-0.5, 0.2),
                estimate=_first(slope_by_seed),
                expected="open",
                reason="M^(−1/2) is an upper bound from the literature on the tangent kernel.",
                assumptions=needs_several_widths,
                needs=one,
                quantities=("train_error_network",),
            ),
            Claim(
                id=f"jacobian-{structure}",
                statement=f"The relative change of J over {STEPS} {structure} steps falls at least like M^(−1/4) with the width.",
                source=f"{PAPER}, Condition 2 (theory file, claim 11)",
                measured="Slope of log ‖J_t − J_0‖_F/‖J_0‖_F against log width.",
                rule=Inequality(-0.25, "less"),
                estimate=slope_by_seed,
                expected="supported" if isotropic and structure != "kfac" else "open",
                reason="The usual bound is M^(−1/2); for ReLU the patterns that flip add a slower part.",
                assumptions=needs_several_widths,
                needs=one,
                quantities=("jacobian_change",),
            ),
        ]
        claims += [
            Claim(
                id=f"stability-{structure}-{scale:g}",
                statement=f"At αη = {scale:g} the {structure} training residual {'shrinks' if side == 'less' else 'grows'}.",
                source=f"{PAPER}, section 4: stable iff η < 2/α (theory file, claim 7)",
                measured="‖f_1 − y‖/‖f_0 − y‖ after the first real step at the middle width.",
                rule=Inequality(1.0, side),
                estimate=_first(by_seed),
                expected="open" if scale > 2 or structure in ("kfac", "unit-wise") else "supported",
                reason=f"The predicted factor is {abs(1 - scale):g}; an earlier run at width 512 saw long first steps bent back "
                "by the curvature of f.",
                needs=where(NAME, structure=structure, scale=scale),
                quantities=("residual",),
            )
            for scale, side in STABILITY.items()
            if scale in config.step_scales
        ]
    return claims


PART = Part(NAME, _cells, _measure, _claims, seconds=lambda width: 0.05 + 0.8 * (width / 2048) ** 2)
