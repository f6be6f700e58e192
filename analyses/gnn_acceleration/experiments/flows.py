"""Gradient flow of linear models on the graph: the bounds, the floors of λ, and skip connections and depth along paths.

Claims 1, 2, 3, 5 and 6. The flow, unlike its bounds, is not in closed form: its error is watched by the energy balance and
by what the flow conserves.
"""

import itertools
from math import ceil

import numpy as np
from jaxtyping import Int

from analyses.claims import claim
from analyses.gnn_acceleration.config import Config
from analyses.gnn_acceleration.flow import Model, Path, descend, flow, initial
from analyses.gnn_acceleration.points import CHANGES, PAPER, ROUND_OFF, memory, page, varies
from analyses.gnn_acceleration.setting import Setting, named, setting_of
from curvlab import study
from curvlab.theory import graph_dynamics as theory

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
"""Of a flow, in 1/λ_max of the tangent kernel at the start; the kernel grows on the way. Models are compared at this horizon
of either, which is shorter for the larger model."""
POINTS = 41
STEP = 1 / 16
"""Largest learning rate of gradient descent, in 1/λ_max of the tangent kernel along the flow."""
TOLERANCE = 1e-6
"""Above the error of the integration, which the claims on energy and conservation hold to the same."""
ONE_RUN = "all seeds are one run turned round: orthogonal layers, zero heads and a fixed split; --nodes draws nodes"


def _points(config: Config) -> list[study.Point]:
    depths = config.swept_depths
    compared = max((depth for depth in depths if depth <= COMPARED_DEPTH), default=depths[0])
    return [
        {"aggregation": aggregation, "features": features, "depth": depth, "start": start}
        for aggregation in config.aggregation
        for features in ("all", "few")
        for depth in depths
        for start in (STARTS if depth == compared and depth > 0 else ["zero"])
    ]


def _start(cell: study.Cell, setting: Setting, scales: range) -> Model:
    init, head_norm = STARTS[str(cell["start"])]
    rng = np.random.default_rng(int(cell["seed"]))
    return initial(setting.propagated(max(scales)), setting.targets, scales, rng, init, head_norm)


def _measure(cell: study.Cell, context: study.Context[Config]) -> study.Observations:
    setting, depth = setting_of(cell, context.config), int(cell["depth"])
    models = {
        "single": _start(cell, setting, range(depth, depth + 1)),
        "multi": _start(cell, setting, range(depth + 1)),
    }
    compared = cell["start"] == "zero" and depth > 0
    if compared:
        models["shallow"] = _start(cell, setting, range(depth))
    ends = {name: DURATION / model.sharpness() for name, model in models.items()}
    grids = {name: np.linspace(0.0, end, POINTS) for name, end in ends.items()}
    paths = {name: flow(model, np.union1d(grids[name], [*ends.values()])) for name, model in models.items()}
    rows = []
    for name in ("single", "multi"):
        rows += _bounds(paths[name], name, setting.nodes.numpy()) + _checks(paths[name], name)
        if cell["start"] == "orthogonal":
            rows += _descent(models[name], grids[name], name)
    rows += _scales(paths["multi"])
    if compared:
        replicated = context.config.drawn_nodes or cell["features"] == "few"
        rows += _along(paths["multi"], depth)
        rows += _compared(paths, ends, {} if replicated else study.outside(ONE_RUN))
    return rows


def _compared(paths: dict[str, Path], ends: dict[str, float], status: dict[str, str]) -> list[dict[str, object]]:
    """Losses that the multiscale model leaves over those of the others, at one time and each at its own horizon."""
    rows = []
    for change, other in (("skip", "single"), ("depth", "shallow")):
        same = max(_left(paths["multi"], ends[of]) / _left(paths[other], ends[of]) for of in ("multi", other))
        own = _left(paths["multi"], ends["multi"]) / _left(paths[other], ends[other])
        rows += [
            study.observed(f"{change}_ratio", same, **status),
            study.observed(f"{change}_own_ratio", own, **status),
        ]
    return rows


def _left(path: Path, time: float) -> float:
    """L over its initial value at one of the times of a path."""
    return float(path.losses[np.abs(path.times - time).argmin()] / path.losses[0])


def _stack(model: Model) -> np.ndarray:
    """The features of all scales with a head, one upon the other."""
    return np.concatenate([model.features[scale] for scale in model.heads])


def _bound(path: Path, floors: np.ndarray, features: np.ndarray) -> tuple[float, float]:
    """Largest excess of L − L⋆ over its bound, over L(0), and the measured exponent over the bound's."""
    excess, bound = path.bounded(floors, features)
    measured = np.log(excess[0] / max(excess[-1], 1e-12 * excess[0]))
    guaranteed = np.log(excess[0] / bound[-1])
    loose = float(measured / guaranteed) if guaranteed > 0 else float("nan")
    return max(0.0, float((excess - bound).max() / path.losses[0])), loose


def _bounds(path: Path, name: str, nodes: Int[np.ndarray, " n"]) -> list[dict[str, object]]:
    """Theorems 1 and 2a, which say nothing where features lack rank; the nodes that deprive them of it are named."""
    start = path.models[0]
    floors, features = path.floors[:, list(start.heads)].min(axis=1), _stack(start)
    excess, loose = _bound(path, floors, features)
    missing = int(min(features.shape) - np.linalg.matrix_rank(features))
    guilty = nodes[theory.dependent_nodes(features)] if missing else nodes[:0]
    lacking = f"the features lack {missing} of the ranks that σ_min needs, by the nodes {named(guilty)}"
    status = study.outside(lacking) if missing else {}
    of_rank = {"missing": missing, "nodes": " ".join(map(str, guilty)), **status}
    rows = [
        study.observed(f"excess_{name}", excess, model=name, **of_rank),
        study.observed("floor", float(floors.min()), model=name),
        study.observed("floor_start", float(floors[0]), model=name),
    ]
    if np.isfinite(loose):
        rows.append(study.observed("looseness", loose, model=name))
    return rows


def _scales(path: Path) -> list[dict[str, object]]:
    """Theorem 2b at every informative scale; its proof holds for those of full column rank, a claim asks about the others."""
    rows = []
    for scale, floors in enumerate(path.floors.T):
        features = path.models[0].features[scale]
        if path.losses[-1] <= theory.optimal_loss(features, path.models[0].targets):
            continue
        excess, _ = _bound(path, floors, features)
        full = np.linalg.matrix_rank(features) == features.shape[1]
        for quantity, within, found in (
            ("scale_excess", full, "the scale lacks full column rank"),
            ("deficient_scale_excess", not full, "the scale has full column rank"),
        ):
            status = {} if within else study.outside(found)
            rows.append(study.observed(quantity, excess, scale=scale, **status))
    return rows


def _checks(path: Path, name: str) -> list[dict[str, object]]:
    """Energy balance, conservation, and the floors that follow from it."""
    start, at = path.models[0], {"model": name, "tolerance": TOLERANCE}
    rows = [study.observed("energy", path.energy, **at)]
    if not start.layers:
        return rows
    before = theory.conserved(start.heads, start.layers)
    changes = [
        float(np.linalg.norm(now - then) / np.linalg.norm(layer) ** 2)
        for model in path.models[1:]
        for now, then, layer in zip(theory.conserved(model.heads, model.layers), before, model.layers, strict=True)
    ]
    rows.append(study.observed("conserved", max(changes), **at))
    guaranteed = np.array(theory.floor_of_products(start.heads, start.layers))
    rows.append(study.observed("guaranteed", float(guaranteed[-1]), model=name))
    if guaranteed[-1] > 0:
        shortfall = float((guaranteed - path.floors).max())
        rows.append(study.observed("floor_shortfall", max(0.0, shortfall), model=name))
    return rows


def _descent(model: Model, grid: np.ndarray, name: str) -> list[dict[str, object]]:
    """Gradient descent at a step and at half of it: the flow's bound, and the order of its distance from the flow."""
    exact = flow(model, grid)
    sharpest = max(point.sharpness() for point in exact.models)
    steps = ceil((grid[1] - grid[0]) * sharpest / STEP)
    paths = [descend(model, grid, steps * halved) for halved in (1, 2)]
    outputs = [np.stack([point.residual for point in path.models]) for path in (exact, *paths)]
    distances = [float(np.linalg.norm(found - outputs[0])) for found in outputs[1:]]
    floors = paths[0].floors[:, list(model.heads)].min(axis=1)
    excess, _ = _bound(paths[0], floors, _stack(model))
    return [
        study.observed("descent_excess", excess, model=name),
        study.observed("descent_halving", distances[0] / distances[1], model=name),
    ]


def _along(path: Path, depth: int) -> list[dict[str, object]]:
    """What skip connections, and the last layer, add to the speed at the points of a multiscale path."""
    rows = []
    for name, change in CHANGES.items():
        gains = np.array([model.gain(change.kept(depth)) for model in path.models])
        total = gains[:, 1:].sum(axis=1) / gains[:, 0]
        rows.append(study.observed(f"{name}_slow_down", max(0.0, -float(total.min()))))
    return rows


def _deep(depth: object) -> bool:
    """Whether there are layers, without which a model has one scale only."""
    return depth != 0


ALONG = {"skip": CHANGES["skip"].statement, "depth": "The last layer accelerates"}
"""Claims in words, by change, of the points of one path."""

INTEGRATED = "the error of the integration, to which flow-energy holds the flow"
"""Why bounds are judged to `TOLERANCE`."""
ON_GRAPH = "all features and n/4 random combinations of them, all depths and starts"
"""What the claims on bounds are measured on."""


def _always(
    id_: str, source: str, quantity: str, statement: str, measured: str, expected: study.Expected, **further: object
) -> study.Claim:
    """Return the claim that a flow never exceeds something, which has a meaning only if the flow is integrated well."""
    rule = study.Always(quantity, "less", TOLERANCE)
    return claim(
        id_, source, rule, statement, measured, expected, bound_from=INTEGRATED, given="flow-energy", **further
    )


OF_BOUNDS = [
    *(
        _always(f"bound-{model}", source, f"excess_{model}",
                f"The loss of the {model} model obeys L(T) − L⋆ ≤ (L(0) − L⋆) exp(−4 λ_T σ_min²({features}) T).",
                f"Largest excess over the bound along the flow, over L(0), with λ_T followed along it; {ON_GRAPH}, whose features "
                "have the rank that σ_min needs.",
                study.supported("It is a theorem."), group="paper")
        for model, source, features in (
            ("single", f"{PAPER}, theorem 1", "G_H"), ("multi", page("theorem 2", "claim 3a"), "G^[H]"),
        )
    ),
    *(
        _always(id_, page("theorem 2", "claim 3b, recalled"), quantity,
                f"A multiscale model decays towards L⋆_l at the rate of every single scale l {which} full column rank.",
                f"Largest excess over the bound of a scale along the flow, over L(0); {ON_GRAPH}; scales whose optimum the loss "
                "passes are left out.",
                expected, group=group)
        for id_, quantity, which, expected, group in (
            ("bound-scale", "scale_excess", "of",
             study.supported("With full column rank every prediction lies in the row space of G_l (derived)."), "derived"),
            ("bound-scale-deficient", "deficient_scale_excess", "without",
             study.undecided("Counter-examples exist, see scale-anywhere; this asks whether training runs into one."),
             "exploration"),
        )
    ),
    _always("bound-descent", f"{PAPER}, theorems 1 and 2, which are about the flow", "descent_excess",
            "Gradient descent obeys the bounds of the flow at T = ηk.",
            "Largest excess over the bound at η ≤ 1/(16 λ_max), λ_max the largest along the flow, over L(0).",
            study.supported("The bounds are loose, and (1 − x) ≤ exp(−x)."), group="derived", at={"start": "orthogonal"}),
    _always("floor-guaranteed", page("time-independent condition", "claim 2; the floor is derived"), "floor_shortfall",
            "Square layers keep λ_min(B^(1:l)ᵀB^(1:l)) above the floor that the conserved matrices give.",
            "Largest shortfall of λ_min at any time and scale, for starts with a positive floor.",
            study.supported("It follows from the conservation law."), group="derived", at={"depth": _deep}),
]  # fmt: skip

OF_FLOWS = [
    claim("flow-energy", f"{PAPER}, section 4, dL/dt", study.Identity("energy"),
          "The loss falls by the integral of ‖∇L‖², to the accuracy that the bounds are judged by.",
          "Distance of the two at the end, over L(0).",
          study.supported("A check of the integration."), group="self-check"),
    claim("flow-conserved", page("time-independent condition", "claim 2; derived"), study.Identity("conserved"),
          "The flow conserves B_iB_iᵀ − B_{i+1}ᵀB_{i+1} − W_iᵀW_i.",
          "Largest change over ‖B_i‖².",
          study.supported("It is an identity of the flow (derived)."), group="self-check", at={"depth": _deep}),
    claim("descent-order", f"{PAPER}, algorithm (docs/theory/xu_zhang_jegelka_kawaguchi_2021.md)",
          study.Equivalence("descent_halving", 2.0, 0.2, centre="geometric mean"),
          "Gradient descent approaches the flow in proportion to η.",
          "Distance of the outputs from the flow's at η ≤ 1/(16 λ_max), over that at half of it, all points of time.",
          study.supported("It is Euler's method."), group="self-check", at={"start": "orthogonal"},
          estimate=study.geometric_by_seed),
    *(
        claim(f"{name}-along-path", page("section 4", f"claim {change.number}"),
              study.Always(f"{name}_slow_down", "less", ROUND_OFF),
              f"{ALONG[name]} at every point of a multiscale path from zero heads.",
              "Largest relative loss of speed against the model without the new scales at the same outputs.",
              study.undecided("It holds at zero heads; further on no theorem says so."), group="exploration",
              bound_from="round-off", at={"start": "zero", "depth": _deep})
        for name, change in CHANGES.items()
    ),
]  # fmt: skip

HORIZONS = {
    "faster": ("ratio", "paper", "", f"at T = {DURATION:g}/λ_max of either model, the worse of the two",
               study.supported("It is faster at the start, and both models move along the same V.")),
    "faster-at-own-rate": ("own_ratio", "exploration", ", each at its own horizon",
                           f"each at T = {DURATION:g}/λ_max of its own, as after equally many steps of gradient descent at the "
                           "largest rates that both admit",
                           study.undecided("A larger kernel has a larger λ_max, and hence less time.")),
}  # fmt: skip
"""By the end of an id: quantity, group, what the statement adds, where losses are compared, and what is expected."""


def _faster(aggregation: str) -> list[study.Claim]:
    return [
        claim(f"{name}-{horizon}-{aggregation}", page("section 4", f"claim {change.number}"),
              study.Inequality(f"{name}_{quantity}", "less", 1.0, centre="geometric mean"),
              f"{change.statement} in training from zero heads with {aggregation.upper()} aggregation{added}.",
              f"Loss left with over that without, {where}; geometric mean over depths.",
              expected, group=group, bound_from="equal losses",
              at={"start": "zero", "features": "all", "depth": _deep, "aggregation": aggregation},
              estimate=study.geometric_by_seed)
        for name, change in CHANGES.items()
        for horizon, (quantity, group, added, where, expected) in HORIZONS.items()
    ]  # fmt: skip


def _claims(config: Config) -> list[study.Claim]:
    return [*OF_BOUNDS, *OF_FLOWS, *itertools.chain.from_iterable(map(_faster, config.aggregation))]


FLOWS: study.Experiment[Config] = study.Experiment(
    name="flows",
    cells=_points,
    measure=_measure,
    varies=varies,
    claims=_claims,
    seconds=lambda cell, _: 0.1 + 0.1 * int(cell["depth"]),
    memory=memory,
)
