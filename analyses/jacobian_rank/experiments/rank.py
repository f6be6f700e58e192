"""Full row rank at initialisation, of the whole Jacobian and of its blocks (claim 1)."""

from functools import partial
from itertools import product
from math import cos, sin

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

import curvlab
from analyses.claims import claim
from analyses.jacobian_rank.config import Config
from analyses.jacobian_rank.descent import unit_rank
from analyses.jacobian_rank.networks import NETWORKS, network_of
from analyses.jacobian_rank.points import experiment, page, seconds
from analyses.jacobian_rank.setting import Setting
from analyses.specs import classifies_nodes
from curvlab import study, theory
from curvlab.nn import TwoLayer
from curvlab.rows import Rows
from curvlab.spectrum import rank

DISTINCT, DUPLICATED, PARALLEL, NEAR = "distinct", "duplicated", "parallel", "near"
ANGLES = (0.2, 0.1, 0.05, 0.02)
"""Angles between the first two inputs, in radians, where they are nearly parallel."""
SAMPLES = (10, 20, 80)
"""Numbers of samples tried besides the configured one."""
NEAR_EXPONENTS = {
    "relu": (
        1.0,
        "A share proportional to the angle of the units tells the two apart, each by an entry of its full size.",
    ),
    "erf": (2.0, "The two rows differ in proportion to the angle."),
}
"""Exponent of the angle with which λ_min(G) falls, by activation, and its derivation."""


def _points(config: Config) -> list[study.Point]:
    activations, widths = config.activation, config.swept_widths
    smallest, largest, first = {"width": widths[0]}, {"width": widths[-1]}, {"activation": activations[0]}
    graph = classifies_nodes(config.problem)
    dependent = (DUPLICATED,) if graph else (DUPLICATED, PARALLEL)
    own: list[study.Point] = [
        *({"inputs": DISTINCT, "width": width, "activation": name} for name, width in product(activations, widths)),
        *({"inputs": inputs, **smallest, "activation": name} for name, inputs in product(activations, dependent)),
    ]
    others: list[study.Point] = []
    if not graph:
        near = product(activations, ANGLES)
        own += [{"inputs": NEAR, "angle": angle, **largest, "activation": name} for name, angle in near]
        if "samples" in config.takes:
            own += [{"inputs": DISTINCT, **largest, **first, "samples": samples} for samples in SAMPLES]
        cases = product(NETWORKS, (DISTINCT, DUPLICATED))
        others = [{"network": network, "inputs": inputs, **smallest, **first} for network, inputs in cases]
    return [*({"network": "own", **point} for point in own), *others]


def _inputs(x: Float[Tensor, "N d"], cell: study.Cell) -> Float[Tensor, "N d"]:
    """Return the inputs, the second of them made to depend on the first one."""
    changed, first = x.clone(), x[0]
    match cell["inputs"]:
        case "duplicated":
            changed[1] = first
        case "parallel":
            changed[1] = 2 * first
        case "near":
            angle = float(cell["angle"])
            across = x[1] - (x[1] @ first) / (first @ first) * first
            changed[1] = cos(angle) * first + sin(angle) * first.norm() / across.norm() * across
    return changed


def _measure(cell: study.Cell, context: study.Context[Config]) -> study.Observations:
    setting = Setting.of(cell, context.config)
    x = _inputs(setting.inputs, cell)
    model = setting.problem.model if cell["network"] == "own" else network_of(setting, cell)
    rows = curvlab.jacobian(model, x)
    values = torch.linalg.eigvalsh(rows.gram()).numpy(force=True)
    found, expected = rank(rows), _expected_missing(cell)
    missing = rows.R - found.rank
    measured = [
        study.observed("missing", missing),
        study.observed("undecided", found.undecided),
        study.observed("smallest_ratio", values[0] / values[-1]),
    ]
    if rows.P >= rows.R:
        measured.append(study.observed("surprise", missing - expected, tolerance=0.0))
    for layer in rows.layers:
        if layer.size >= rows.R:
            surprise = rows.R - rank(rows, parameters=layer.layout.names).rank - expected
            measured.append(study.observed("layer_surprise", surprise, tolerance=0.0, layer=layer.name))
    if cell["inputs"] == NEAR:
        measured.append(study.observed("near_smallest", values[0]))
    if isinstance(model, TwoLayer) and cell["inputs"] == DISTINCT and "activation" in cell.coordinates:
        measured += _two_layer(x, rows, values, str(cell["activation"]))
    return measured


def _expected_missing(cell: study.Cell) -> int:
    """Rows that depend on others: a copy of an input, and for ReLU without biases a multiple of one."""
    parallel = cell["inputs"] == PARALLEL and cell.coordinates.get("activation", "relu") == "relu"
    return int(cell["inputs"] == DUPLICATED or parallel)


def _two_layer(x: Tensor, rows: Rows, values: Float[np.ndarray, " R"], activation: str) -> list[dict[str, object]]:
    smallest = np.linalg.eigvalsh(theory.two_layer_limit_gram(x.numpy(force=True), activation))[0]
    return [
        study.observed("smallest", values[0]),
        study.observed("smallest_limit", smallest),
        study.observed("limit_ratio", float(values[0]) / smallest),
        *unit_rank(rows),
    ]


def _full_rank(name: str, group: str, statement: str, reason: str, **at: object) -> study.Claim:
    return claim(
        f"rank-{name}", page("condition 1", "claim 1"), study.Identity("surprise"), statement,
        "Number of rows missing in the numerical rank, against the number expected.",
        study.supported(reason), group=group, at=at,
    )  # fmt: skip


def _near(activation: str) -> study.Claim:
    exponent, reason = NEAR_EXPONENTS[activation]
    return claim(
        f"rank-near-{activation}", page("condition 1 and λ₀", "claim 1 and traps; exponent derived"),
        study.Equivalence("near_smallest", exponent, 0.2, centre="mean"),
        f"Two inputs at a small angle cost no rank with {activation}; λ_min(G) falls as the angle to the power {exponent:g}.",
        f"Slope of log λ_min(G) against the logarithm of angles from {ANGLES[-1]:g} to {ANGLES[0]:g}, at the largest width.",
        study.supported(reason), group="derived", at={"inputs": NEAR, "activation": activation},
        estimate=partial(study.slope_by_seed, against="angle"),
    )  # fmt: skip


def _claims(config: Config) -> list[study.Claim]:
    distinct = {"network": "own", "inputs": DISTINCT, "samples": config.samples}
    networks = tuple(NETWORKS)
    return [
        _full_rank("initial", "paper", "The Jacobian of the two-layer network has full row rank at initialisation.",
                   "λ_min of the limit kernel is positive for inputs that are not parallel.",
                   network="own", inputs=(DISTINCT, NEAR)),
        _full_rank("duplicated", "derived", "A duplicated input costs exactly one dimension of row rank.",
                   "Its row is the other's.", network="own", inputs=DUPLICATED),
        _full_rank("parallel", "derived",
                   "A positively parallel input costs one dimension of row rank with ReLU, and none with a smooth activation.",
                   "A ReLU network without biases is positively homogeneous in its input.", network="own", inputs=PARALLEL),
        _full_rank("networks", "derived",
                   "Networks with all layers trained (MLP, convolutional, residual) have full row rank at initialisation, less one "
                   "for a duplicated input.",
                   "P is far above the number of rows.", network=networks),
        claim("rank-layers", page("condition 1", "claim 1, for layer-wise blocks"), study.Identity("layer_surprise"),
              "Every single layer of these networks has full row rank, less one for a duplicated input.",
              "Number of rows missing in the numerical rank of a layer's Jacobian, against the number expected.",
              study.supported("Its inputs are distinct. Layers with fewer parameters than rows are left out."),
              group="derived", at={"network": networks}),
        claim("rank-limit", page("section 4", "setting"),
              study.Equivalence("limit_ratio", 1.0, 0.1, centre="geometric mean"),
              "λ_min of the kernel at initialisation tends to that of the limit kernel.",
              "λ_min(G(0))/λ_min(G∞) at the largest width.", study.supported("G is a mean over m units."),
              group="paper", at={**distinct, "width": config.swept_widths[-1]}, estimate=study.geometric_by_seed),
        *map(_near, config.activation),
        claim("rank-units", page("condition 1", "claim 1, for unit-wise blocks"), study.Identity("unit_surprise"),
              "The row rank of a single ReLU unit is the number of samples on which it is active, where that of the whole network "
              "is full.",
              "Largest difference between the two over some of the units.",
              study.supported("Rows of samples on which it is not active are zero, and inputs are in general position."),
              group="derived", at={**distinct, "activation": "relu"}),
    ]  # fmt: skip


RANK = experiment(_points, name="rank", measure=_measure, claims=_claims, seconds=seconds(0.01, 0.1))
