"""Labels and speed: true labels against random permutations of themselves, at the start and along the flow (claim 8)."""

from __future__ import annotations

from dataclasses import replace
from math import log10

import numpy as np
import pandas as pd
from jaxtyping import Float

from analyses.estimates import by_seed, identities
from analyses.gnn_acceleration.config import Config
from analyses.gnn_acceleration.flow import Model, flow, initial
from analyses.gnn_acceleration.part import PAPER, Part, cells_of
from analyses.gnn_acceleration.setting import setting_of
from analyses.part import TOLERANCE_FACTOR, Observations, where
from curvlab.study import Cell, Claim, Identity, Inequality
from curvlab.theory import graph_dynamics as theory

NAME = "labels"
PERMUTATIONS = 999
DEPTH = 2
"""Of the models that are trained."""
DURATION = 2.0
"""Of the flow, in 1/λ_max of the tangent kernel at the start."""
LAYERS = 0.7
"""Root of c, BᵀB = cI, of the layers whose initial speed is compared with its closed form."""
TARGETS = {"centred": "centred targets", "one-hot": "one-hot targets that are not centred"}


def _cells(config: Config) -> list[Cell]:
    return cells_of(NAME, config, [{"aggregation": aggregation} for aggregation in config.aggregation])


def _speeds(
    targets: Float[np.ndarray, "C n"], features: Float[np.ndarray, "F n"], orders: np.ndarray
) -> Float[np.ndarray, " K"]:
    """‖Y_π Gᵀ‖² of every permutation π of the columns of Y."""
    gram = features.T @ features
    permuted = targets[:, orders]
    return np.asarray(np.einsum("ckn,nm,ckm->k", permuted, gram, permuted, optimize=True))


def _measure(cell: Cell, config: Config) -> Observations:
    setting = setting_of(cell, config)
    rng = np.random.default_rng(int(cell["seed"]))
    Y, depth = setting.targets, config.swept_depths[-1]
    features = setting.propagated(max(depth, DEPTH))
    identity = np.arange(Y.shape[1])
    orders = np.stack([identity, *(rng.permutation(identity) for _ in range(PERMUTATIONS))])
    rows: list[dict[str, object]] = []
    for targets, values in (("one-hot", Y), ("centred", Y - Y.mean(axis=1, keepdims=True))):
        for scale in range(1, depth + 1):
            speeds = _speeds(values, features[scale], orders)
            at: dict[str, object] = {"depth": scale, "targets": targets}
            reached = np.mean(speeds >= speeds[0] * (1 - 1e-12))
            rows += [
                {"quantity": "p_value", "value": float(reached), **at},
                {"quantity": "log_ratio", "value": log10(speeds[0] / speeds[1:].mean()), **at},
            ]
    model = initial(features[: DEPTH + 1], Y, range(DEPTH + 1), rng)
    return [*rows, *_initial(model), _trained(model, orders[1])]


def _initial(model: Model) -> list[dict[str, object]]:
    """Speed at zero heads by the gradient, against 4 c^l ‖Y G_lᵀ‖²."""
    scaled = replace(model, layers=[LAYERS * layer for layer in model.layers])
    gradients, _ = scaled.gradient()
    predicted = theory.initial_speed(scaled.heads, LAYERS**2, scaled.features, scaled.targets)
    tolerance = TOLERANCE_FACTOR * max(model.features[0].shape) * float(np.finfo(float).eps)
    return [
        {
            "quantity": "initial_error",
            "value": float(np.square(gradient).sum()) / predicted[scale] - 1,
            "tolerance": tolerance,
            "depth": scale,
        }
        for scale, gradient in gradients.items()
    ]


def _trained(model: Model, order: np.ndarray) -> dict[str, object]:
    """log10 of the loss that true labels leave over the one that permuted ones leave, in the same time."""
    times = np.array([0.0, DURATION / model.sharpness()])
    true, permuted = (flow(start, times).losses for start in (model, replace(model, targets=model.targets[:, order])))
    return {"quantity": "trained_log_ratio", "value": log10(true[-1] / permuted[-1])}


def _claims(config: Config) -> list[Claim]:
    claims = [
        Claim(
            id="labels-initial",
            statement="At zero heads and BᵀB = cI head l starts with the speed 4 c^l ‖Y G_lᵀ‖².",
            source=f"{PAPER}, section 4 (theory file, claim 8, derived)",
            measured=f"Relative distance of ‖∂L/∂W_l‖² from it, c = {LAYERS**2:.2f}, scales 0 to {DEPTH}.",
            rule=Identity(),
            estimate=identities,
            expected="supported",
            reason="V = −2Y, and orthogonal layers keep norms.",
            needs=where(NAME),
            quantities=("initial_error",),
        )
    ]
    for aggregation in config.aggregation:
        if config.swept_depths[-1] > 0:
            claims += [_permutation_claim(aggregation, targets, words) for targets, words in TARGETS.items()]
        claims.append(
            Claim(
                id=f"labels-trained-{aggregation}",
                statement=f"True labels train faster than permuted ones with {aggregation.upper()} aggregation.",
                source=f"{PAPER}, section 4 (theory file, claim 8, recalled)",
                measured=f"log10 of the losses left, true over permuted, after T = {DURATION:g}/λ_max, multiscale model with "
                f"{DEPTH} layers, one permutation a seed, targets not centred.",
                rule=Inequality(0.0, "less"),
                estimate=by_seed,
                expected="supported",
                reason="Labels of neighbours agree, so they lie along the leading singular vectors.",
                needs=where(NAME, aggregation=aggregation),
                quantities=("trained_log_ratio",),
            )
        )
    return claims


def _permutation_claim(aggregation: str, targets: str, words: str) -> Claim:
    def estimate(table: pd.DataFrame) -> pd.DataFrame:
        return by_seed(table[table["targets"] == targets])

    return Claim(
        id=f"labels-{targets}-{aggregation}",
        statement=f"True labels have a greater initial speed than permutations of themselves, {words}, "
        f"{aggregation.upper()} aggregation.",
        source=f"{PAPER}, section 4 (theory file, claim 8, recalled)",
        measured=f"p-value of a permutation test of ‖Y G_lᵀ‖² with {PERMUTATIONS} permutations, the mean over scales l ≥ 1.",
        rule=Inequality(0.05, "less"),
        estimate=estimate,
        expected="open",
        reason="Labels of neighbours agree, but few training nodes may not show it, and the constant direction, which all "
        "permutations share, is large where targets are not centred.",
        needs=where(NAME, aggregation=aggregation),
        quantities=("p_value",),
    )


PART = Part(NAME, _cells, _measure, _claims, seconds=lambda _: 0.5)
