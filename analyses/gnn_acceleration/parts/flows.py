"""Gradient flow of linear models on the graph: the bounds, the floors of λ, and skip connections and depth along paths.

Claims 1, 2, 3, 5 and 6. The flow, unlike its bounds, is not in closed form: its error is watched by the energy balance and
by what the flow conserves.
"""

from __future__ import annotations

from functools import partial
from math import ceil, log10

import numpy as np
import pandas as pd

from analyses.estimates import by_seed, identities
from analyses.gnn_acceleration.config import Config
from analyses.gnn_acceleration.flow import Model, Path, descend, flow, initial
from analyses.gnn_acceleration.part import PAPER, Part, cells_of
from analyses.gnn_acceleration.setting import Setting, setting_of
from analyses.part import Expectation, Observations, where
from curvlab.study import Cell, Claim, Equivalence, Identity, Inequality
from curvlab.theory import graph_dynamics as theory

NAME = "flows"
STARTS: dict[str, tuple[str, float]] = {
    "zero": ("orthogonal", 0.0),
    "orthogonal": ("orthogonal", 0.5),
    "glorot": ("glorot", 0.5),
    "uniform": ("uniform", 0.5),
}
"""Layers and spectral norm of the heads. The first is followed at every depth, the others at one, the second also by
gradient descent."""
COMPARED_DEPTH = 2
DURATION = 2.0
"""Of a flow, in 1/λ_max of the tangent kernel at the start; the kernel grows on the way."""
POINTS = 41
STEP = 1 / 16
"""Largest learning rate of gradient descent, in 1/λ_max of the tangent kernel along the flow."""
TOLERANCE = 1e-6
"""Above the error of the integration, which the claims on energy and conservation hold to the same."""


def _cells(config: Config) -> list[Cell]:
    depths = config.swept_depths
    compared = max((depth for depth in depths if depth <= COMPARED_DEPTH), default=depths[0])
    points = [
        {"aggregation": aggregation, "depth": depth, "start": start}
        for aggregation in config.aggregation
        for depth in depths
        for start in (STARTS if depth == compared and depth > 0 else ["zero"])
    ]
    return cells_of(NAME, config, points)


def _start(cell: Cell, setting: Setting, scales: range) -> Model:
    init, head_norm = STARTS[str(cell["start"])]
    rng = np.random.default_rng(int(cell["seed"]))
    return initial(setting.propagated(max(scales)), setting.targets, scales, rng, init, head_norm)


def _measure(cell: Cell, config: Config) -> Observations:
    setting, depth = setting_of(cell, config), int(cell["depth"])
    single = _start(cell, setting, range(depth, depth + 1))
    multi = _start(cell, setting, range(depth + 1))
    end = DURATION / multi.sharpness()
    rows: list[dict[str, object]] = []
    paths: dict[str, Path] = {}
    for name, model in (("single", single), ("multi", multi)):
        own = DURATION / model.sharpness()
        grid = np.linspace(0.0, own, POINTS)
        paths[name] = flow(model, np.unique(np.append(grid, end)) if end < own else grid)
        rows += _bounds(paths[name], name) + _checks(paths[name], name)
        if cell["start"] == "orthogonal":
            rows += _descent(model, grid, name)
    rows += _scales(paths["multi"])
    if cell["start"] == "zero":
        rows += [{"quantity": "left", "value": log10(_left(paths[name], end)), "model": name} for name in paths]
    if cell["start"] == "zero" and depth > 0:
        shallow = flow(_start(cell, setting, range(depth)), np.array([0.0, end]))
        reached = log10(_left(paths["multi"], end))
        rows += [
            {"quantity": "skip_log_ratio", "value": reached - log10(_left(paths["single"], end))},
            {"quantity": "depth_log_ratio", "value": reached - log10(_left(shallow, end))},
            *_along(paths["multi"], depth),
        ]
    return rows


def _left(path: Path, time: float) -> float:
    """L over its initial value at one of the times of a path."""
    return float(path.losses[np.abs(path.times - time).argmin()] / path.losses[0])


def _stack(model: Model) -> np.ndarray:
    """The features of all scales with a head, one upon the other."""
    return np.concatenate([model.features[scale] for scale in model.heads])


def _bound(path: Path, floors: np.ndarray, features: np.ndarray) -> tuple[float, float]:
    """Largest excess of L − L⋆ over its bound, over L(0), and log10 of the measured exponent over the bound's."""
    start = path.models[0]
    optimum = theory.optimal_loss(features, start.targets)
    excess = path.losses - optimum
    bound = theory.loss_bound(excess[0], floors, theory.least_singular_value(features), path.times)
    measured = np.log(excess[0] / max(excess[-1], 1e-12 * excess[0]))
    guaranteed = np.log(excess[0] / bound[-1])
    loose = log10(measured / guaranteed) if guaranteed > 0 else float("nan")
    return max(0.0, float((excess - bound).max() / path.losses[0])), loose


def _floors(path: Path) -> np.ndarray:
    """λ_min(B^(1:l)ᵀ B^(1:l)) by time and scale."""
    return np.stack([model.floors() for model in path.models])


def _rank(features: np.ndarray) -> int:
    """Ranks that features lack of the number that theorem 1 asks for, min(F, n)."""
    return int(min(features.shape) - np.linalg.matrix_rank(features))


def _bounds(path: Path, name: str) -> list[dict[str, object]]:
    """Theorems 1 and 2a."""
    start = path.models[0]
    floors = _floors(path)[:, list(start.heads)].min(axis=1)
    features = _stack(start)
    excess, loose = _bound(path, floors, features)
    missing = _rank(features)
    rows: list[dict[str, object]] = [
        {
            "quantity": "excess_vacuous" if missing else "excess",
            "value": excess,
            "tolerance": TOLERANCE,
            "model": name,
            "missing": missing,
            "nodes": " ".join(map(str, theory.dependent_nodes(features))) if missing else "",
        },
        {"quantity": "floor", "value": float(floors.min()), "model": name},
        {"quantity": "floor_start", "value": float(floors[0]), "model": name},
    ]
    if np.isfinite(loose):
        rows.append({"quantity": "looseness", "value": loose, "model": name})
    return rows


def _scales(path: Path) -> list[dict[str, object]]:
    """Theorem 2b at every scale; its proof holds for those of full column rank."""
    rows: list[dict[str, object]] = []
    for scale, floors in enumerate(_floors(path).T):
        features = path.models[0].features[scale]
        covered = np.linalg.matrix_rank(features) == features.shape[1]
        excess, _ = _bound(path, floors, features)
        informative = path.losses[-1] > theory.optimal_loss(features, path.models[0].targets)
        if informative:
            quantity = "scale_excess" if covered else "scale_excess_uncovered"
            rows.append({"quantity": quantity, "value": excess, "tolerance": TOLERANCE, "scale": scale})
    return rows


def _checks(path: Path, name: str) -> list[dict[str, object]]:
    """Energy balance, conservation, and the floors that follow from it."""
    start, at = path.models[0], {"model": name, "tolerance": TOLERANCE}
    rows: list[dict[str, object]] = [{"quantity": "energy", "value": path.energy, **at}]
    if not start.layers:
        return rows
    before = theory.conserved(start.heads, start.layers)
    changes = [
        float(np.linalg.norm(now - then) / np.linalg.norm(layer) ** 2)
        for model in path.models[1:]
        for now, then, layer in zip(theory.conserved(model.heads, model.layers), before, model.layers, strict=True)
    ]
    rows.append({"quantity": "conserved", "value": max(changes), **at})
    guaranteed = np.array(theory.floor_of_products(start.heads, start.layers))
    rows.append({"quantity": "guaranteed", "value": float(guaranteed[-1]), "model": name})
    if guaranteed[-1] > 0:
        shortfall = float((guaranteed - _floors(path)).max())
        rows.append({"quantity": "floor_shortfall", "value": max(0.0, shortfall), **at})
    return rows


def _descent(model: Model, grid: np.ndarray, name: str) -> list[dict[str, object]]:
    """Gradient descent at a step and at half of it: the flow's bound, and the order of its distance from the flow."""
    exact = flow(model, grid)
    sharpest = max(point.sharpness() for point in exact.models)
    steps = ceil((grid[1] - grid[0]) * sharpest / STEP)
    paths = [descend(model, grid, steps * halved) for halved in (1, 2)]
    outputs = [np.stack([point.residual for point in path.models]) for path in (exact, *paths)]
    distances = [float(np.linalg.norm(found - outputs[0])) for found in outputs[1:]]
    floors = _floors(paths[0])[:, list(model.heads)].min(axis=1)
    excess, _ = _bound(paths[0], floors, _stack(model))
    return [
        {"quantity": "descent_excess", "value": excess, "tolerance": TOLERANCE, "model": name},
        {"quantity": "descent_halving", "value": distances[0] / distances[1], "model": name},
    ]


def _along(path: Path, depth: int) -> list[dict[str, object]]:
    """What skip connections, and the last layer, add to the speed at the points of a multiscale path."""
    rows: list[dict[str, object]] = []
    for change, reference in (("skip", [depth]), ("depth", list(range(depth)))):
        gains = np.array([model.gain(reference) for model in path.models])
        total = gains[:, 1:].sum(axis=1) / gains[:, 0]
        rows += [
            {"quantity": "path_slow_down", "value": max(0.0, -float(total.min())), "tolerance": 1e-9, "change": change},
            {"quantity": "path_condition_fails", "value": float(np.mean(gains[:, 2] < 0)), "change": change},
        ]
    return rows


def _only_with_rank(table: pd.DataFrame, model: str) -> str | None:
    """Say which nodes deprive all of a model's features of the rank that the bound needs."""
    of_model = table[table["model"] == model]
    if "excess" in set(of_model["quantity"]):
        return None
    worst = of_model.iloc[0]
    return f"The features lack {worst['missing']:g} of the ranks that σ_min needs, by the nodes {worst['nodes']}."


def _bound_claim(model: str, id_: str, theorem: str, features: str) -> Claim:
    return Claim(
        id=id_,
        statement=f"The loss of the {model} model obeys L(T) − L⋆ ≤ (L(0) − L⋆) exp(−4 λ_T σ_min²({features}) T).",
        source=f"{PAPER}, theorem {theorem}",
        measured="Largest excess over the bound along the flow, over L(0), with λ_T followed along it; all depths and starts "
        "whose features have the rank that σ_min needs.",
        rule=Identity(),
        estimate=lambda table: identities(table[(table["model"] == model) & (table["quantity"] == "excess")]),
        expected="supported",
        reason="It is a theorem.",
        assumptions=partial(_only_with_rank, model=model),
        needs=where(NAME),
        quantities=("excess", "excess_vacuous"),
    )


def _identity(
    id_: str, statement: str, measured: str, quantity: str, expected: Expectation, reason: str, source: str
) -> Claim:
    return Claim(
        id=id_,
        statement=statement,
        source=f"{PAPER}, {source}",
        measured=measured,
        rule=Identity(),
        estimate=identities,
        expected=expected,
        reason=reason,
        needs=where(NAME),
        quantities=(quantity,),
    )


SCALES: dict[str, tuple[str, str, Expectation, str]] = {
    "scale_excess": (
        "bound-scale",
        "of full column rank",
        "supported",
        "With full column rank every prediction lies in the row space of G_l (derived).",
    ),
    "scale_excess_uncovered": (
        "bound-scale-deficient",
        "without full column rank",
        "open",
        "Counter-examples exist, see scale-anywhere; this asks whether training runs into one.",
    ),
}
"""Theorem 2b by the quantity that decides it: id, which scales, expectation and reason."""


def _scale_claim(quantity: str) -> Claim:
    id_, which, expected, reason = SCALES[quantity]

    def assumptions(table: pd.DataFrame) -> str | None:
        return None if quantity in set(table["quantity"]) else f"There is no informative scale {which}."

    return Claim(
        id=id_,
        statement=f"A multiscale model decays towards L⋆_l at the rate of every single scale l {which}.",
        source=f"{PAPER}, theorem 2 (theory file, claim 3b, recalled)",
        measured="Largest excess over the bound of a scale along the flow, over L(0); scales whose optimum the loss passes are "
        "left out.",
        rule=Identity(),
        estimate=lambda table: identities(table[table["quantity"] == quantity]),
        expected=expected,
        reason=reason,
        assumptions=assumptions,
        needs=where(NAME),
        quantities=tuple(SCALES),
    )


def _path_claim(change: str, words: str, number: int) -> Claim:
    return Claim(
        id=f"{change}-along-path",
        statement=f"{words} at every point of a multiscale path from zero heads.",
        source=f"{PAPER}, section 4 (theory file, claim {number})",
        measured="Largest relative loss of speed against the model without the new scales at the same outputs.",
        rule=Identity(),
        estimate=lambda table: identities(table[table["change"] == change]),
        expected="open",
        reason="It holds at zero heads; further on no theorem says so.",
        needs=where(NAME, start="zero"),
        quantities=("path_slow_down",),
    )


def _faster_claim(config: Config, aggregation: str, change: str, words: str, number: int) -> Claim:
    one_run = (
        "All seeds are one run turned round: orthogonal layers, zero heads and a fixed split; --nodes draws nodes."
    )
    return Claim(
        id=f"{change}-faster-{aggregation}",
        statement=f"{words} in training from zero heads with {aggregation.upper()} aggregation.",
        source=f"{PAPER}, section 4 (theory file, claim {number})",
        measured=f"log10 of the losses left with over without at T = {DURATION:g}/λ_max of the larger model, mean over depths.",
        rule=Inequality(0.0, "less"),
        estimate=by_seed,
        expected="supported",
        reason="It is faster at the start, and both models move along the same V.",
        assumptions=lambda _: None if config.drawn_nodes else one_run,
        needs=where(NAME, start="zero", aggregation=aggregation),
        quantities=(f"{change}_log_ratio",),
    )


def _claims(config: Config) -> list[Claim]:
    claims = [
        _bound_claim("single", "bound-single", "1", "G_H"),
        _bound_claim("multi", "bound-multi", "2 (theory file, claim 3a)", "G^[H]"),
        _scale_claim("scale_excess"),
        _scale_claim("scale_excess_uncovered"),
        _identity(
            "bound-descent", "Gradient descent obeys the bounds of the flow at T = ηk.",
            "Largest excess over the bound at η ≤ 1/(16 λ_max), λ_max the largest along the flow, over L(0).",
            "descent_excess", "supported",
            "The bounds are loose, and (1 − x) ≤ exp(−x).", "theorems 1 and 2, which are about the flow",
        ),
        _identity(
            "floor-guaranteed", "Square layers keep λ_min(B^(1:l)ᵀB^(1:l)) above the floor that the conserved matrices give.",
            "Largest shortfall of λ_min at any time and scale, for starts with a positive floor.", "floor_shortfall",
            "supported", "It follows from the conservation law.",
            "time-independent condition (theory file, claim 2; the floor is derived)",
        ),
        _identity(
            "flow-energy", "The loss falls by the integral of ‖∇L‖², to the accuracy that the bounds are judged by.",
            "Distance of the two at the end, over L(0).", "energy", "supported", "A check of the integration.",
            "section 4, dL/dt",
        ),
        _identity(
            "flow-conserved", "The flow conserves B_iB_iᵀ − B_{i+1}ᵀB_{i+1} − W_iᵀW_i.",
            "Largest change over ‖B_i‖².", "conserved", "supported", "It is an identity of the flow (derived).",
            "time-independent condition (theory file, claim 2; derived)",
        ),
        Claim(
            id="descent-order",
            statement="Gradient descent approaches the flow in proportion to η.",
            source=f"{PAPER}, algorithm (theory file)",
            measured="Distance of the outputs from the flow's at η ≤ 1/(16 λ_max), over that at half of it, all points of time.",
            rule=Equivalence(2.0, 0.2),
            estimate=by_seed,
            expected="supported",
            reason="It is Euler's method.",
            needs=where(NAME, start="orthogonal"),
            quantities=("descent_halving",),
        ),
        _path_claim("skip", "Skip connections accelerate", 5),
        _path_claim("depth", "The last layer accelerates", 6),
    ]  # fmt: skip
    if max(config.swept_depths) > 0:
        for aggregation in config.aggregation:
            claims += [
                _faster_claim(config, aggregation, "skip", "Skip connections accelerate", 5),
                _faster_claim(config, aggregation, "depth", "One more layer accelerates", 6),
            ]
    else:
        claims = claims[:-2]
    return claims


PART = Part(NAME, _cells, _measure, _claims, seconds=lambda depth: 1.0 + depth)
