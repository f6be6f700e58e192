"""Counter-examples: scales one at a time, and skip connections and depth at equal outputs.

Claims 3b, 5 and 6 on random small models: weights, widths, graphs, features and targets are drawn, not trained.
"""

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import numpy as np
import torch

from analyses.claims import claim
from analyses.gnn_acceleration.config import Config
from analyses.gnn_acceleration.flow import Model, flow
from analyses.gnn_acceleration.points import CHANGES, ROUND_OFF, by_aggregation, memory, page
from analyses.gnn_acceleration.setting import powers, random_propagation
from curvlab import study
from curvlab.theory import graph_dynamics as theory

DEPTHS = (1, 2, 4, 6)
HEADS = (0.0, 0.1, 0.3, 1.0, 3.0, 10.0)
"""Standard deviation of the heads' entries, in units of width^(−1/2)."""
LARGEST = 8
"""Most features, hidden units and training nodes; there are as many nodes again at most."""
SHORT = 0.5
"""Duration of the flows that confirm a counter-example, in 1/λ_max of the tangent kernel."""


def _drawn(rng: np.random.Generator, depth: int, aggregation: str, heads: float, *, deficient: bool = False) -> Model:
    """A multiscale model, all random: graph, features, targets, widths, the size of its layers and its weights.

    With `deficient` there are fewer features than training nodes, and as many hidden units as features at least, so that no
    product of layers lacks rank.
    """
    n = int(rng.integers(2, LARGEST + 1))
    first = int(rng.integers(1, n if deficient else LARGEST + 1))
    widths = [first, *(int(rng.integers(first if deficient else 1, LARGEST + 1)) for _ in range(depth))]
    C, N = int(rng.integers(1, 4)), n + int(rng.integers(0, LARGEST + 1))
    size = 10.0 ** rng.uniform(-0.5, 0.5)
    layers = [size * rng.normal(size=(after, before)) / np.sqrt(before) for before, after in pairwise(widths)]
    drawn = {scale: heads * rng.normal(size=(C, width)) / np.sqrt(width) for scale, width in enumerate(widths)}
    x = powers(random_propagation(rng, N, aggregation), torch.from_numpy(rng.normal(size=(N, first))), depth)
    targets = 10.0 ** rng.uniform(-1, 1) * rng.normal(size=(C, n))
    return Model([G[:n].numpy().T.copy() for G in x], targets, drawn, layers)


def equal_outputs(model: Model, reference: Sequence[int]) -> Model:
    """Return the model with the nearest heads such that the scales outside the reference add nothing to its outputs.

    The head of scale 0 moves the outputs only: what is claimed of speed at given outputs does not depend on it. In the
    reference it keeps its value, and in the model that is returned it may differ from that.
    """
    added = sorted({scale for scale in model.heads if scale not in reference} | {0})
    reached = np.concatenate([model.products[scale] @ model.features[scale] for scale in added])
    drawn = np.concatenate([model.heads[scale] for scale in added], axis=1)
    silent = drawn - drawn @ reached @ np.linalg.pinv(reached)
    places = np.cumsum([model.heads[scale].shape[1] for scale in added])[:-1]
    heads = model.heads | dict(zip(added, np.split(silent, places, axis=1), strict=True))
    if 0 in reference:
        heads[0] = heads[0] + model.heads[0]
    return replace(model, heads=heads)


def _measure(cell: study.Cell, context: study.Context[Config]) -> study.Observations:
    rng = np.random.default_rng(study.stream(int(cell["seed"]), "models"))
    aggregation, draws = str(cell["aggregation"]), context.config.draws
    rows = []
    for depth in DEPTHS:
        for heads in HEADS:
            rows += _compare(rng, depth, heads, aggregation, draws)
        rows += _one_scale(rng, depth, aggregation, draws)
    return rows


def _compare(
    rng: np.random.Generator, depth: int, heads: float, aggregation: str, draws: int
) -> list[dict[str, object]]:
    """Random models with and without skip connections, and with and without the last layer, at equal outputs."""
    gains: dict[str, list[float]] = {name: [] for name in CHANGES}
    for _ in range(draws):
        drawn = _drawn(rng, depth, aggregation, heads)
        for name, change in CHANGES.items():
            kept = change.kept(depth)
            speed, of_heads, of_layers = equal_outputs(drawn, kept).gain(kept)
            gains[name].append((of_heads + of_layers) / speed)
    rows = []
    for name, found in gains.items():
        total = np.array(found)
        at = {"depth": depth, "heads": heads, "draws": draws, "change": name}
        rows += [
            study.observed("slow_down", max(0.0, float(-total.min())), tolerance=ROUND_OFF, **at),
            study.observed("slower", float(np.mean(total < -ROUND_OFF)), **at),
        ]
    return rows


def _one_scale(rng: np.random.Generator, depth: int, aggregation: str, draws: int) -> list[dict[str, object]]:
    """The rate of theorem 2b for single scales whose features lack column rank; the worst start is followed."""
    worst: tuple[float, Model, int] | None = None
    informative = broken = 0
    for _ in range(draws):
        drawn = _drawn(rng, depth, aggregation, float(rng.choice(HEADS[1:])), deficient=True)
        scale = int(rng.integers(0, depth + 1))
        model = _fitted(drawn, scale) if rng.random() < 0.5 else drawn
        excess = model.loss - theory.optimal_loss(model.features[scale], model.targets)
        rate = 4 * model.floors()[scale] * theory.least_singular_value(model.features[scale]) ** 2
        if excess <= ROUND_OFF * model.loss or rate == 0:
            continue
        informative += 1
        speed, _, _ = model.gain(model.heads)
        shortfall = 1 - speed / (rate * excess)
        broken += shortfall > ROUND_OFF
        if worst is None or shortfall > worst[0]:
            worst = shortfall, model, scale
    if worst is None:
        return []
    _, start, scale = worst
    at = {"depth": depth, "draws": draws, "informative": informative, "scale": scale}
    path = flow(start, np.linspace(0.0, SHORT / start.sharpness(), 21))
    left, bound = path.bounded(path.floors[:, scale], start.features[scale])
    return [
        study.observed("scale_excess", max(0.0, float((left - bound).max() / left[0])), **at),
        study.observed("scale_broken", broken / informative, **at),
        study.observed("scale_trivial", 1 - informative / draws, **at),
    ]


def _fitted(model: Model, scale: int) -> Model:
    """Return the model with one head fitted to what the others leave, by least squares."""
    left = model.targets - model.outputs(other for other in model.heads if other != scale)
    reached = model.products[scale] @ model.features[scale]
    return replace(model, heads={**model.heads, scale: np.linalg.lstsq(reached.T, left.T)[0].T})


ONE_LAYER = {
    "skip": "One layer: all new terms are squares, as no scale but the last goes through it.",
    "depth": "The model had no layer before, so all new terms are squares.",
}
"""Why a change makes models with a single layer faster, by its name."""


def _change_claims(name: str, draws: int) -> list[study.Claim]:
    change = CHANGES[name]
    large = (
        "A new head whose gradient opposes the old one's makes a layer's term smaller, and large heads let it outweigh the new "
        "heads' own terms (derived)."
    )
    place = page("section 4", f"claim {change.number}")
    measured = (
        f"Largest relative loss of speed −dL/dt at equal outputs; one observation is the worst of {draws} random models, graphs, "
        "features and targets with one depth, size of heads and seed."
    )
    return [
        *(
            claim(f"{name}-{case}", place, study.Identity("slow_down"), f"{change.statement} {where}.", measured,
                  study.supported(reason), group="self-check", estimate=study.among(study.identities, change=name, **drawn))
            for case, where, drawn, reason in (
                ("zero", "where the new heads are zero", {"heads": 0.0}, "Then the layers' terms are as before."),
                ("one", "in models with one layer, whatever the weights", {"depth": 1}, ONE_LAYER[name]),
            )
        ),
        claim(f"{name}-anywhere", place, study.Always("slow_down", "less", ROUND_OFF),
              f"{change.statement} in models of 2 layers or more, whatever the weights, the graph and the features.", measured,
              study.refuted(large), group="paper", bound_from="round-off",
              estimate=study.among(study.identities, change=name, heads=HEADS[1:], depth=DEPTHS[1:])),
    ]  # fmt: skip


def _claims(config: Config) -> list[study.Claim]:
    return [
        *(one for name in CHANGES for one in _change_claims(name, config.draws)),
        claim("scale-anywhere", page("theorem 2", "claim 3b, recalled"), study.Always("scale_excess", "less", 1e-6),
              "The loss of a multiscale model decays towards L⋆_l at least at the rate of every single scale l, also where G_l "
              "lacks column rank.",
              f"Excess over the bound along a short flow, over L(0) − L⋆_l, from the worst of {config.draws} random starts with "
              "fewer features than training nodes; starts with L ≤ L⋆_l are left out.",
              study.refuted("Outputs outside the row space of G_l add to the loss but not to ‖V G_lᵀ‖ (derived)."),
              group="paper", bound_from="the error of the integration"),
    ]  # fmt: skip


SEARCH: study.Experiment[Config] = study.Experiment(
    name="search",
    cells=by_aggregation,
    measure=_measure,
    varies=("initialisation", "data"),
    claims=_claims,
    seconds=1.5,
    memory=memory,
)
