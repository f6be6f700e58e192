"""Labels and speed: true labels against random permutations of themselves, at the start and along the flow (claim 8)."""

from dataclasses import replace

import numpy as np
from jaxtyping import Float

from analyses.claims import claim
from analyses.gnn_acceleration.config import Config
from analyses.gnn_acceleration.flow import Model, flow, initial
from analyses.gnn_acceleration.points import by_aggregation, memory, page, varies
from analyses.gnn_acceleration.setting import setting_of
from curvlab import study
from curvlab.theory import graph_dynamics as theory

PERMUTATIONS = 999
DEPTH = 2
"""Of the models that are trained."""
DURATION = 2.0
"""Of the flow, in 1/λ_max of the tangent kernel at the start."""
LAYERS = 0.7
"""Root of c, BᵀB = cI, of the layers whose initial speed is compared with its closed form."""
ONE_SPLIT = "all seeds have the labels of one split; --nodes draws nodes"
TARGETS = {"centred": "centred targets", "one-hot": "one-hot targets that are not centred"}


def _speeds(
    targets: Float[np.ndarray, "C n"], features: Float[np.ndarray, "F n"], orders: np.ndarray
) -> Float[np.ndarray, " K"]:
    """‖Y_π Gᵀ‖² of every permutation π of the columns of Y."""
    gram = features.T @ features
    permuted = targets[:, orders]
    return np.asarray(np.einsum("ckn,nm,ckm->k", permuted, gram, permuted, optimize=True))


def _measure(cell: study.Cell, context: study.Context[Config]) -> study.Observations:
    setting = setting_of(cell, context.config)
    rng = np.random.default_rng(study.stream(int(cell["seed"]), "permutations"))
    Y, depth = setting.targets, context.config.propagations
    replicated = {} if context.config.drawn_nodes else study.outside(ONE_SPLIT)
    features = setting.propagated(max(depth, DEPTH))
    identity = np.arange(Y.shape[1])
    orders = np.stack([identity, *(rng.permutation(identity) for _ in range(PERMUTATIONS))])
    rows = []
    for targets, values in (("one-hot", Y), ("centred", Y - Y.mean(axis=1, keepdims=True))):
        for scale in range(1, depth + 1):
            speeds = _speeds(values, features[scale], orders)
            ratio = speeds[0] / np.exp(np.log(speeds[1:]).mean())
            rows.append(study.observed("speed_ratio", float(ratio), depth=scale, targets=targets, **replicated))
    model = initial(features[: DEPTH + 1], Y, range(DEPTH + 1), np.random.default_rng(int(cell["seed"])))
    return [*rows, *_initial(model), _trained(model, orders[1])]


def _initial(model: Model) -> list[dict[str, object]]:
    """Speed at zero heads by the gradient, against 4 c^l ‖Y G_lᵀ‖²."""
    scaled = replace(model, layers=[LAYERS * layer for layer in model.layers])
    gradients, _ = scaled.gradient()
    predicted = theory.initial_speed(scaled.heads, LAYERS**2, scaled.features, scaled.targets)
    tolerance = study.round_off(max(model.features[0].shape))
    return [
        study.observed(
            "initial_error", float(np.square(gradient).sum()) / predicted[scale] - 1, tolerance=tolerance, depth=scale
        )
        for scale, gradient in gradients.items()
    ]


def _trained(model: Model, order: np.ndarray) -> dict[str, object]:
    """Loss that true labels leave over the one that permuted ones leave, in the same time."""
    times = np.array([0.0, DURATION / model.sharpness()])
    true, permuted = (flow(start, times).losses for start in (model, replace(model, targets=model.targets[:, order])))
    return study.observed("trained_ratio", float(true[-1] / permuted[-1]))


def _claims(config: Config) -> list[study.Claim]:
    initial = claim(
        "labels-initial", page("section 4", "claim 8, derived"), study.Identity("initial_error"),
        "At zero heads and BᵀB = cI head l starts with the speed 4 c^l ‖Y G_lᵀ‖².",
        f"Relative distance of ‖∂L/∂W_l‖² from it, c = {LAYERS**2:.2f}, scales 0 to {DEPTH}.",
        study.supported("V = −2Y, and orthogonal layers keep norms."), group="self-check",
    )  # fmt: skip
    return [initial, *(one for aggregation in config.aggregation for one in _with(aggregation))]


def _with(aggregation: str) -> list[study.Claim]:
    source, at = page("section 4", "claim 8, recalled"), {"aggregation": aggregation}
    return [
        *(
            claim(f"labels-{targets}-{aggregation}", source,
                  study.Inequality("speed_ratio", "greater", 1.0, centre="geometric mean"),
                  f"True labels have a greater initial speed than permutations of themselves, {words}, {aggregation.upper()} "
                  "aggregation.",
                  f"‖Y G_lᵀ‖² of the true labels over its geometric mean over {PERMUTATIONS} permutations; geometric mean over "
                  "scales l ≥ 1.",
                  study.undecided("Labels of neighbours agree, but few training nodes may not show it, and the constant direction, "
                                  "which all permutations share, is large where targets are not centred."),
                  group="paper", bound_from="permutations that are worth as much", at=at,
                  estimate=study.among(study.geometric_by_seed, targets=targets))
            for targets, words in TARGETS.items()
        ),
        claim(f"labels-trained-{aggregation}", source, study.Inequality("trained_ratio", "less", 1.0, centre="geometric mean"),
              f"True labels train faster than permuted ones with {aggregation.upper()} aggregation.",
              f"Loss left, true over permuted, after T = {DURATION:g}/λ_max, multiscale model with {DEPTH} layers, "
              "one permutation a seed, targets not centred.",
              study.supported("Labels of neighbours agree, so they lie along the leading singular vectors."), group="paper",
              bound_from="equal losses", at=at),
    ]  # fmt: skip


LABELS: study.Experiment[Config] = study.Experiment(
    name="labels",
    cells=by_aggregation,
    measure=_measure,
    varies=varies,
    claims=_claims,
    seconds=0.1,
    memory=memory,
)
