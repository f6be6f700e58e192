"""Full row rank at initialisation, of the whole Jacobian and of its blocks (claim 1)."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from math import cos, sin

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

import curvlab
from analyses.assembly import classifies_nodes
from analyses.estimates import at_largest_width, by_seed, identities, slope_by_seed
from analyses.jacobian_rank.config import Config
from analyses.jacobian_rank.descent import unit_rank
from analyses.jacobian_rank.networks import NETWORKS, network_of
from analyses.jacobian_rank.part import PAPER, Part, cells_of
from analyses.jacobian_rank.setting import setting_of
from analyses.part import Observations, where
from curvlab import theory
from curvlab.nn import TwoLayer
from curvlab.rows import Rows
from curvlab.spectrum import rank
from curvlab.study import Cell, Claim, Equivalence, Identity, Inequality

NAME = "rank"
DISTINCT, DUPLICATED, PARALLEL, NEAR = "distinct", "duplicated", "parallel", "near"
ANGLES = (0.2, 0.1, 0.05, 0.02)
"""Angles between the first two inputs, in radians, where they are nearly parallel."""
SAMPLES = (10, 20, 80)
"""Numbers of samples tried besides the configured one."""


def _cells(config: Config) -> list[Cell]:
    smallest = config.swept_widths[0]
    points: list[Mapping[str, object]] = [
        {"network": "own", "inputs": DISTINCT, "width": width, "activation": activation}
        for activation in config.activation
        for width in config.swept_widths
    ]
    graph = classifies_nodes(config.problem)
    points += [
        {"network": "own", "inputs": inputs, "width": smallest, "activation": activation}
        for activation in config.activation
        for inputs in ((DUPLICATED,) if graph else (DUPLICATED, PARALLEL))
    ]
    if graph:
        return cells_of(NAME, config, points)
    points += [
        {"network": "own", "inputs": NEAR, "angle": angle, "width": config.swept_widths[-1], "activation": activation}
        for activation in config.activation
        for angle in ANGLES
    ]
    if "samples" in config.takes:
        at = {
            "network": "own",
            "inputs": DISTINCT,
            "width": config.swept_widths[-1],
            "activation": config.activation[0],
        }
        points += [{**at, "samples": samples} for samples in SAMPLES]
    points += [
        {"network": name, "inputs": inputs, "width": smallest, "activation": config.activation[0]}
        for name in NETWORKS
        for inputs in (DISTINCT, DUPLICATED)
    ]
    return cells_of(NAME, config, points)


def _inputs(x: Float[Tensor, "N d"], cell: Cell) -> Float[Tensor, "N d"]:
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


def _measure(cell: Cell, config: Config) -> Observations:
    setting = setting_of(cell, config)
    x = _inputs(setting.inputs, cell)
    model = setting.problem.model if cell["network"] == "own" else network_of(setting, cell)
    rows = curvlab.jacobian(model, x)
    kernel = rows.gram()
    values = torch.linalg.eigvalsh(kernel).numpy(force=True)
    found = rank(rows)
    missing = rows.R - found.rank
    expected = _expected_missing(cell)
    measured: list[dict[str, object]] = [
        {"quantity": "missing", "value": missing},
        {"quantity": "undecided", "value": found.undecided},
        {"quantity": "smallest_ratio", "value": float(values[0] / values[-1])},
    ]
    if rows.P >= rows.R:
        measured.append({"quantity": "surprise", "value": float(missing - expected), "tolerance": 0.0})
    for layer in rows.layers:
        if layer.size >= rows.R:
            surprise = rows.R - rank(rows, parameters=layer.layout.names).rank - expected
            measured.append({"quantity": "layer_surprise", "value": surprise, "tolerance": 0.0, "layer": layer.name})
    if cell["inputs"] == NEAR:
        measured.append({"quantity": "near_smallest", "value": float(values[0])})
    if isinstance(model, TwoLayer) and cell["inputs"] == DISTINCT and "activation" in cell.coordinates:
        measured += _two_layer(x, rows, values, str(cell["activation"]))
    return measured


def _expected_missing(cell: Cell) -> int:
    """Rows that depend on others: a copy of an input, and for ReLU without biases a multiple of one."""
    parallel = cell["inputs"] == PARALLEL and cell.coordinates.get("activation", "relu") == "relu"
    return int(cell["inputs"] == DUPLICATED or parallel)


def _two_layer(x: Tensor, rows: Rows, values: Float[np.ndarray, " R"], activation: str) -> list[dict[str, object]]:
    limit = theory.two_layer_limit_gram(x.numpy(force=True), activation)
    smallest = float(np.linalg.eigvalsh(limit)[0])
    return [
        {"quantity": "smallest", "value": float(values[0])},
        {"quantity": "smallest_limit", "value": smallest},
        {"quantity": "limit_ratio", "value": float(values[0]) / smallest},
        {"quantity": "unit_rank", "value": unit_rank(rows)},
    ]


def _claims(config: Config) -> list[Claim]:
    def full_rank(id_: str, statement: str, reason: str, **at: object) -> Claim:
        return Claim(
            id=id_,
            statement=statement,
            source=f"{PAPER}, condition 1 (theory file, claim 1)",
            measured="Number of rows missing in the numerical rank, against the number expected.",
            rule=Identity(),
            estimate=identities,
            expected="supported",
            reason=reason,
            needs=where(NAME, **at),
            quantities=("surprise",),
        )

    claims = [
        full_rank(
            "rank-initial",
            "The Jacobian of the two-layer network has full row rank at initialisation.",
            "λ_min of the limit kernel is positive for inputs that are not parallel.",
            network="own",
            inputs=(DISTINCT, NEAR),
        ),
        full_rank(
            "rank-duplicated",
            "A duplicated input costs exactly one dimension of row rank.",
            "Its row is the other's.",
            network="own",
            inputs=DUPLICATED,
        ),
        full_rank(
            "rank-parallel",
            "A positively parallel input costs one dimension of row rank with ReLU, and none with a smooth activation.",
            "A ReLU network without biases is positively homogeneous in its input.",
            network="own",
            inputs=PARALLEL,
        ),
        full_rank(
            "rank-networks",
            "Networks with all layers trained (MLP, convolutional, residual) have full row rank at initialisation, less one "
            "for a duplicated input.",
            "P is far above the number of rows.",
            network=tuple(NETWORKS),
        ),
        Claim(
            id="rank-layers",
            statement="Every single layer of these networks has full row rank, less one for a duplicated input.",
            source=f"{PAPER}, condition 1, for layer-wise blocks (derived)",
            measured="Number of rows missing in the numerical rank of a layer's Jacobian, against the number expected.",
            rule=Identity(),
            estimate=identities,
            expected="supported",
            reason="Its inputs are distinct. Layers with fewer parameters than rows are left out.",
            needs=where(NAME, network=tuple(NETWORKS)),
            quantities=("layer_surprise",),
        ),
        Claim(
            id="rank-limit",
            statement="λ_min of the kernel at initialisation tends to that of the limit kernel.",
            source=f"{PAPER}, section 4 (theory file, setting)",
            measured="λ_min(G(0))/λ_min(G∞) at the largest width.",
            rule=Equivalence(1.0, 0.1),
            estimate=at_largest_width(by_seed),
            expected="supported",
            reason="G is a mean over m units.",
            needs=where(NAME, network="own", inputs=DISTINCT, samples=config.samples),
            quantities=("limit_ratio",),
        ),
    ]
    exponents = {
        "relu": (
            1.0,
            "A share proportional to the angle of the units tells the two apart, each by an entry of its full size.",
        ),
        "erf": (2.0, "The two rows differ in proportion to the angle."),
    }
    for activation in config.activation:
        exponent, reason = exponents[activation]
        claims.append(
            Claim(
                id=f"rank-near-{activation}",
                statement=f"Two inputs at a small angle cost no rank with {activation}; λ_min(G) falls as the angle to the power "
                f"{exponent:g}.",
                source=f"{PAPER}, condition 1 and λ₀ (theory file, claim 1 and traps; exponent derived)",
                measured=f"Slope of log λ_min(G) against the logarithm of angles from {ANGLES[-1]:g} to {ANGLES[0]:g}, at the "
                "largest width.",
                rule=Equivalence(exponent, 0.2),
                estimate=partial(slope_by_seed, against="angle"),
                expected="supported",
                reason=reason,
                needs=where(NAME, inputs=NEAR, activation=activation),
                quantities=("near_smallest",),
            )
        )
    if "relu" in config.activation:
        claims.append(
            Claim(
                id="rank-units",
                statement="The Jacobian of a single ReLU unit lacks row rank where that of the whole network does not.",
                source=f"{PAPER}, condition 1, for unit-wise blocks (derived)",
                measured="Mean over units of the row rank of a unit's block, over the number of rows.",
                rule=Inequality(0.9, "less"),
                estimate=by_seed,
                expected="supported",
                reason="A unit is active on about half of the samples, and only their rows are not zero.",
                needs=where(NAME, network="own", inputs=DISTINCT, activation="relu", samples=config.samples),
                quantities=("unit_rank",),
            )
        )
    return claims


PART = Part(NAME, _cells, _measure, _claims, seconds=lambda width: 0.01 + 0.1 * width / 16384)
