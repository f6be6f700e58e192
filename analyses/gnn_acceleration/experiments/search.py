"""Counter-examples: scales one at a time, skip connections and depth at equal outputs, and the singular margin.

Claims 2, 3b, 5 and 6 on random small models: weights, graphs and features are drawn, not trained.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from jaxtyping import Float

from analyses.claims import claim
from analyses.gnn_acceleration.config import Config
from analyses.gnn_acceleration.flow import Layers, Model, flow
from analyses.gnn_acceleration.points import by_aggregation, memory, page
from analyses.gnn_acceleration.setting import powers, random_propagation
from curvlab import study
from curvlab.theory import graph_dynamics as theory

DEPTHS = (1, 2, 3, 4)
HEADS = (0.0, 0.1, 0.3, 1.0, 3.0, 10.0)
"""Standard deviation of the heads' entries, in units of width^(−1/2)."""
NODES, TRAINING = 8, 5
WIDE, NARROW = 6, 2
"""Numbers of features above and below the number of training nodes."""
OUTPUTS = 2
ROUND_OFF = 1e-9
"""Smallest relative slow-down that counts."""
RESCALED = 1e3
SHORT = 0.5
"""Duration of the flows that confirm a counter-example, in 1/λ_max of the tangent kernel."""


def _features(rng: np.random.Generator, width: int, depth: int, aggregation: str) -> list[Float[np.ndarray, "F n"]]:
    """G_0, …, G_depth on a random graph."""
    S = random_propagation(rng, NODES, aggregation)
    return [x[:TRAINING].numpy().T.copy() for x in powers(S, torch.from_numpy(rng.normal(size=(NODES, width))), depth)]


def _drawn(rng: np.random.Generator, width: int, depth: int, aggregation: str, heads: float) -> Model:
    """A multiscale model, all weights random."""
    layers: Layers = [rng.normal(size=(width, width)) / np.sqrt(width) for _ in range(depth)]
    drawn = {scale: heads * rng.normal(size=(OUTPUTS, width)) / np.sqrt(width) for scale in range(depth + 1)}
    return Model(_features(rng, width, depth, aggregation), rng.normal(size=(OUTPUTS, TRAINING)), drawn, layers)


def equal_outputs(model: Model, reference: Sequence[int]) -> Model:
    """Return the model with the head of scale 0 such that the scales outside the reference add nothing to the outputs.

    In the reference scale 0 keeps its head; its features must have full column rank.
    """
    surplus = model.outputs(scale for scale in model.heads if scale not in reference and scale > 0)
    own = model.heads[0] if 0 in reference else np.zeros_like(model.heads[0])
    cancelling = own - np.linalg.lstsq(model.features[0].T, surplus.T)[0].T
    return replace(model, heads={**model.heads, 0: cancelling})


def _measure(cell: study.Cell, context: study.Context[Config]) -> study.Observations:
    rng = np.random.default_rng(int(cell["seed"]))
    aggregation, draws = str(cell["aggregation"]), context.config.draws
    rows = []
    for depth in DEPTHS:
        for heads in HEADS:
            rows += _compare(rng, depth, heads, aggregation, draws)
        rows += _one_scale(rng, depth, aggregation, draws)
    return [*rows, *_margin(rng, aggregation)]


def _compare(
    rng: np.random.Generator, depth: int, heads: float, aggregation: str, draws: int
) -> list[dict[str, object]]:
    """Random models with and without skip connections, and with and without the last layer, at equal outputs."""
    gains: dict[str, list[tuple[float, float]]] = {"skip": [], "depth": []}
    for _ in range(draws):
        drawn = _drawn(rng, WIDE, depth, aggregation, heads)
        for change, reference in (("skip", [depth]), ("depth", list(range(depth)))):
            speed, of_heads, of_layers = equal_outputs(drawn, reference).gain(reference)
            gains[change].append(((of_heads + of_layers) / speed, of_layers / speed))
    rows = []
    for change, found in gains.items():
        total, of_layers = np.array(found).T
        at = {"depth": depth, "heads": heads, "draws": draws, "change": change}
        rows += [
            study.observed("slow_down", max(0.0, float(-total.min())), tolerance=ROUND_OFF, **at),
            study.observed("slower", float(np.mean(total < -ROUND_OFF)), **at),
            study.observed("condition_fails", float(np.mean(of_layers < -ROUND_OFF)), **at),
            study.observed(
                "slower_under_condition",
                max(0.0, float(-total[of_layers >= 0].min(initial=0.0))),
                tolerance=ROUND_OFF,
                **at,
            ),
        ]
    return rows


def _one_scale(rng: np.random.Generator, depth: int, aggregation: str, draws: int) -> list[dict[str, object]]:
    """The rate of theorem 2b for single scales whose features lack column rank; the worst start is followed."""
    worst, start, scale_of, informative, broken = 0.0, None, 0, 0, 0
    for _ in range(draws):
        drawn = _drawn(rng, NARROW, depth, aggregation, float(rng.choice(HEADS[1:])))
        scale = int(rng.integers(0, depth + 1))
        model = _fitted(drawn, scale) if rng.random() < 0.5 else drawn
        excess = model.loss - theory.optimal_loss(model.features[scale], model.targets)
        if excess <= ROUND_OFF * model.loss:
            continue
        informative += 1
        rate = 4 * model.floors()[scale] * theory.least_singular_value(model.features[scale]) ** 2
        speed, _, _ = model.gain(model.heads)
        shortfall = 1 - speed / (rate * excess)
        broken += shortfall > ROUND_OFF
        if start is None or shortfall > worst:
            worst, start, scale_of = shortfall, model, scale
    if start is None:
        return []
    at = {"depth": depth, "draws": draws, "informative": informative, "scale": scale_of}
    path = flow(start, np.linspace(0.0, SHORT / start.sharpness(), 21))
    left, bound = path.bounded(path.floors[:, scale_of], start.features[scale_of])
    return [
        study.observed("scale_excess", max(0.0, float((left - bound).max() / left[0])), tolerance=1e-6, **at),
        study.observed("scale_broken", broken / informative, **at),
        study.observed("scale_trivial", 1 - informative / draws, **at),
    ]


def _fitted(model: Model, scale: int) -> Model:
    """Return the model with one head fitted to what the others leave, by least squares."""
    left = model.targets - model.outputs(other for other in model.heads if other != scale)
    reached = model.products[scale] @ model.features[scale]
    return replace(model, heads={**model.heads, scale: np.linalg.lstsq(reached.T, left.T)[0].T})


def _margin(rng: np.random.Generator, aggregation: str) -> list[dict[str, object]]:
    """Smallest singular value of the layers after a rescaling that leaves the outputs as they are."""
    drawn = _drawn(rng, WIDE, 1, aggregation, 1.0)
    model = replace(drawn, heads={1: drawn.heads[1]})
    rescaled = replace(drawn, heads={1: RESCALED * drawn.heads[1]}, layers=[drawn.layers[0] / RESCALED])
    return [
        study.observed("margin_left", float(np.log10(rescaled.floors()[1] / model.floors()[1]))),
        study.observed("margin_loss", abs(rescaled.loss / model.loss - 1), tolerance=ROUND_OFF),
    ]


CHANGES: dict[str, tuple[int, str, str]] = {
    "skip": (
        5,
        "Skip connections accelerate",
        "One layer: all new terms are squares, as no scale but the last goes through it.",
    ),
    "depth": (6, "One more layer accelerates", "The model had no layer before, so all new terms are squares."),
}
"""By name: number on the page of theory, the claim in words, and why it holds with a single layer."""


def _change_claims(change: str, draws: int) -> list[study.Claim]:
    number, words, one = CHANGES[change]
    large = (
        "A new head whose gradient opposes the old one's makes a layer's term smaller, and large heads let it outweigh the new "
        "heads' own terms (derived)."
    )
    searched = (
        ("zero", "where the new heads are zero", {"heads": 0.0},
         study.supported("Then the layers' terms are as before.")),
        ("one", "in models with one layer, whatever the weights", {"depth": 1},
         study.supported(one)),
        ("anywhere", "in models of 2 layers or more, whatever the weights", {"heads": HEADS[1:], "depth": DEPTHS[1:]},
         study.refuted(large)),
    )  # fmt: skip
    return [
        *(
            claim(f"{change}-{name}", page("section 4", f"claim {number}"), study.Identity("slow_down"),
                  f"{words} {where}.",
                  f"Largest relative loss of speed −dL/dt at equal outputs; one observation is the worst of {draws} random models "
                  "with one depth, size of heads and seed.",
                  expected, estimate=study.among(study.identities, change=change, **drawn))
            for name, where, drawn, expected in searched
        ),
        claim(f"{change}-condition", page("section 4", f"claim {number}, recalled"), study.Identity("slower_under_condition"),
              f"{words} wherever Σ_i (‖a_i‖² + 2 b_iᵀa_i) ≥ 0.",
              "Largest relative loss of speed at equal outputs, of the random models that fulfil the condition.",
              study.supported("What the new heads add is never negative."),
              estimate=study.among(study.identities, change=change)),
    ]  # fmt: skip


def _claims(config: Config) -> list[study.Claim]:
    return [
        *(one for change in CHANGES for one in _change_claims(change, config.draws)),
        claim("scale-anywhere", page("theorem 2", "claim 3b, recalled"), study.Identity("scale_excess"),
              "The loss of a multiscale model decays towards L⋆_l at least at the rate of every single scale l, also where G_l "
              "lacks column rank.",
              f"Excess over the bound along a short flow, over L(0) − L⋆_l, from the worst of {config.draws} random starts with "
              f"{TRAINING} training nodes and {NARROW} features; starts with L ≤ L⋆_l are left out.",
              study.refuted("Outputs outside the row space of G_l add to the loss but not to ‖V G_lᵀ‖ (derived).")),
        claim("margin-positive", page("singular margin", "claim 2, recalled"), study.Inequality("margin_left", "greater", -1.0),
              "Some γ > 0 bounds σ_min(B^(1:H)) from below over all weights with the loss of the start.",
              f"log10 of λ_min after W ← {RESCALED:g} W, B ← B/{RESCALED:g}, over λ_min before, which a margin keeps above some "
              "number; −1 is asked for.",
              study.refuted("The rescaling leaves the outputs as they are and makes B as small as one likes (derived).")),
        claim("margin-outputs", page("singular margin", "claim 2, derived"), study.Identity("margin_loss"),
              "That rescaling leaves the loss as it is.",
              "Relative change of the loss.",
              study.supported("W B G is bilinear.")),
    ]  # fmt: skip


SEARCH: study.Experiment[Config] = study.Experiment(
    name="search", cells=by_aggregation, measure=_measure, claims=_claims, seconds=5.0, memory=memory
)
