"""Natural gradient on networks with all layers trained: stability, rate, and the rank of single layers and units on the way."""

from __future__ import annotations

import copy
from functools import partial
from math import log10

import numpy as np
import pandas as pd
import torch

from analyses.assembly import classifies_nodes
from analyses.estimates import by_seed, identities, slope_by_seed, worst_by_seed
from analyses.jacobian_rank.config import Config
from analyses.jacobian_rank.descent import contraction, excess, follow, inspect, natural, squared_residuals
from analyses.jacobian_rank.networks import TRAINED, UNITS, network_setting
from analyses.jacobian_rank.part import PAPER, Part, cells_of
from analyses.jacobian_rank.parts.structures import worst_decade_by_seed
from analyses.jacobian_rank.parts.training import BOUND_TOLERANCE, DRIFTS
from analyses.part import Expectation, Observations, where
from curvlab import theory
from curvlab.fisher import Full
from curvlab.rows import Rows
from curvlab.rows.layer import LayerRows
from curvlab.spectrum import rank
from curvlab.study import Cell, Claim, Equivalence, Identity, Inequality

NAME = "networks"
FACTORS = (0.25, 1, 4)
"""Hidden units or channels, in those of the other experiments."""
ETA, STEPS = 0.5, 4
CHOSEN = 16
"""Units of a layer whose blocks are looked at."""

DRIFT_EXPECTED: dict[str, tuple[Expectation, str]] = {
    "relu": (
        "open",
        "Patterns flip as in the two-layer network, but trained layers above add a part of order m^(−1/2).",
    ),
    "erf": ("supported", "Pre-activations and the weights above them change by O(m^(−1/2)) of their size."),
}


def _cells(config: Config) -> list[Cell]:
    if classifies_nodes(config.problem):
        return []
    points = [
        {
            "network": network,
            "units": int(factor * UNITS[network]),
            "activation": activation,
            "width": config.swept_widths[0],
        }
        for network in TRAINED
        for activation in config.activation
        for factor in FACTORS
    ]
    return cells_of(NAME, config, points)


def _measure(cell: Cell, config: Config) -> Observations:
    setting = network_setting(cell, config)
    structure = Full()
    path, seen = follow(
        copy.deepcopy(setting.problem.model),
        setting,
        structure,
        natural(structure, setting),
        ETA,
        STEPS,
        look=lambda jacobian: jacobian,
    )
    points = [inspect(jacobian, setting) for jacobian in seen]
    squared = squared_residuals(path, setting)
    rows: list[dict[str, object]] = [
        {"quantity": "missing", "value": points[0].deficiency, "tolerance": 0.0},
        {"quantity": "rate_ratio", "value": contraction(squared) / theory.ngd_linear_ratio(ETA)},
    ]
    covered = False
    if setting.full_rank:
        C = theory.stability_constant(max(point.change for point in points), float(setting.eigenvalues[0]))
        covered = theory.largest_step(C) >= ETA
        share = max(point.change_frobenius for point in points) / float(setting.gram.trace().sqrt())
        rows += [
            {"quantity": "constant", "value": C},
            {"quantity": "change_share", "value": share},
            {"quantity": "lost", "value": max(point.deficiency for point in points), "tolerance": 0.0},
        ]
    rows.append(
        {
            "quantity": "excess" if covered else "excess_uncovered",
            "value": excess(squared, theory.ngd_rate_bound(ETA)),
            "tolerance": BOUND_TOLERANCE,
        }
    )
    if cell["units"] == UNITS[str(cell["network"])]:
        rows += _layers(seen) + _units(seen[0], seen[-1])
    return rows


def _layers(seen: list[Rows]) -> list[dict[str, object]]:
    """Rows missing in the rank of single layers on the way; layers with fewer parameters than rows are left out."""
    R = seen[0].R
    return [
        {
            "quantity": "layer_missing",
            "value": max(R - rank(rows, parameters=layer.layout.names).rank for rows in seen),
            "tolerance": 0.0,
            "layer": layer.name,
        }
        for layer in seen[0].layers
        if layer.size >= R
    ]


def _units(start: Rows, end: Rows) -> list[dict[str, object]]:
    """Row rank of single units before the first step and after the last."""
    rows: list[dict[str, object]] = []
    for first, last in zip(start.layers, end.layers, strict=True):
        at = {"layer": first.name}
        (before, before_active), (after, after_active) = _unit_ranks(first), _unit_ranks(last)
        surprises = np.abs(np.concatenate([before - before_active, after - after_active]))
        attainable = min(start.R, first.layout.width)
        rows += [
            {"quantity": "unit_surprise", "value": int(surprises.max()), "tolerance": 0.0, **at},
            {"quantity": "unit_rank", "value": float(before.mean()) / attainable, "when": "initial", **at},
            {"quantity": "unit_rank", "value": float(after.mean()) / attainable, "when": "trained", **at},
        ]
    return rows


def _unit_ranks(layer: LayerRows) -> tuple[np.ndarray, np.ndarray]:
    """Ranks of the blocks of some units, and the samples on which these are active, at most the unit's parameters."""
    chosen = torch.linspace(0, layer.layout.units - 1, min(CHOSEN, layer.layout.units)).long()
    blocks = layer.unit_stack()[chosen]
    active = (blocks != 0).any(-1).sum(-1).clamp_max(layer.layout.width)
    return np.asarray(torch.linalg.matrix_rank(blocks).numpy(force=True)), np.asarray(active.numpy(force=True))


def _change_by_seed(table: pd.DataFrame) -> pd.DataFrame:
    """Estimate by the mean unit rank after training, less that before."""
    means = table.pivot_table(index="seed", columns="when", values="value")
    return (means["trained"] - means["initial"]).rename("value").reset_index()


def _block_claims() -> list[Claim]:
    return [
        Claim(
            id="networks-initial",
            statement="Networks with all layers trained have full row rank at initialisation also where they are narrow.",
            source=f"{PAPER}, condition 1 (theory file, claim 1)",
            measured="Share of the rows missing in the rank of J(0).",
            rule=Identity(),
            estimate=identities,
            expected="refuted",
            reason="P is above the number of rows, but an earlier run found convolutional networks with 2 channels that are dead.",
            needs=where(NAME),
            quantities=("missing",),
        ),
        Claim(
            id="networks-kept",
            statement="Networks with all layers trained that have full row rank keep it along natural gradient, at every width.",
            source=f"{PAPER}, conditions 1 and 2 (theory file, claims 1 and 2)",
            measured=f"Share of the rows missing in the rank of J after each of {STEPS} steps at η = {ETA:g}.",
            rule=Identity(),
            estimate=identities,
            expected="refuted",
            reason="P is above the number of rows, but an earlier run found narrow networks that lose active units in training.",
            needs=where(NAME),
            quantities=("lost",),
        ),
        Claim(
            id="networks-layers",
            statement="Every single layer of these networks keeps full row rank along natural gradient.",
            source=f"{PAPER}, condition 1, for layer-wise blocks (derived)",
            measured="Rows missing in the rank of a layer's Jacobian at any step.",
            rule=Identity(),
            estimate=identities,
            expected="refuted",
            reason="An earlier run found residual networks in which the samples' activation patterns become alike, so that fewer "
            "features than rows are ever active. Layers with fewer parameters than rows are left out.",
            needs=where(NAME),
            quantities=("layer_missing",),
        ),
        Claim(
            id="networks-units",
            statement="The row rank of a single unit is the number of samples on which it is active, up to its number of "
            "parameters, before and after training.",
            source=f"{PAPER}, condition 1, for unit-wise blocks (derived)",
            measured="Largest difference between the two over units of every layer.",
            rule=Identity(),
            estimate=identities,
            expected="refuted",
            reason="A sample's row is zero where the unit is not active, and inputs are in general position, but an earlier run "
            "found residual networks with fewer active inputs than samples after training.",
            needs=where(NAME),
            quantities=("unit_surprise",),
        ),
        Claim(
            id="networks-units-kept",
            statement="Training leaves the mean row rank of single units as it was.",
            source=f"{PAPER}, condition 1, for unit-wise blocks (derived)",
            measured="Mean over units, layers and networks of row rank over what is attainable, after training less before.",
            rule=Equivalence(0.0, 0.02),
            estimate=_change_by_seed,
            expected="supported",
            reason="Few activation patterns flip, about as many on as off.",
            needs=where(NAME),
            quantities=("unit_rank",),
        ),
    ]


def _drift_claim(network: str, activation: str) -> Claim:
    exponent, (expected, reason) = DRIFTS[activation].exponent, DRIFT_EXPECTED[activation]
    if (network, activation) == ("residual", "erf"):
        expected, reason = (
            "refuted",
            "An earlier run found that J changes by several times its norm, far from the limit.",
        )
    return Claim(
        id=f"networks-drift-{network}-{activation}",
        statement=f"Along natural gradient the relative change of the Jacobian of the {network} network falls as "
        f"m^({exponent:g}) with {activation}.",
        source=f"{PAPER}, section 4 (theory file, claim 9, for all layers trained)",
        measured=f"Slope of log max_k ‖J(k) − J(0)‖_F/‖J(0)‖_F at η = {ETA:g} against log m, m hidden units or channels, over "
        "networks with full row rank at initialisation.",
        rule=Equivalence(exponent, 0.05),
        estimate=partial(slope_by_seed, against="units"),
        expected=expected,
        reason=reason,
        needs=where(NAME, network=network, activation=activation),
        quantities=("change_share",),
    )


def _theorem_claims(network: str) -> list[Claim]:
    widest = where(NAME, network=network, units=int(FACTORS[-1] * UNITS[network]))
    return [
        Claim(
            id=f"networks-stable-{network}",
            statement=f"Condition 2 holds along natural gradient on the widest {network} network.",
            source=f"{PAPER}, condition 2 (theory file, claim 2)",
            measured="log10 of C_emp along the run, the largest over activations; condition 2 wants C_emp below ½.",
            rule=Inequality(log10(0.5), "less"),
            estimate=worst_decade_by_seed,
            expected="refuted",
            reason="It takes far wider layers already on the two-layer network.",
            needs=widest,
            quantities=("constant",),
        ),
        Claim(
            id=f"networks-bound-{network}",
            statement=f"The bound of theorem 1, (1 − η)^k, holds on the widest {network} network where the theorem's conditions "
            "do not.",
            source=f"{PAPER}, theorem 1: the converse is not claimed (theory file, claim 2)",
            measured="Largest excess of ‖r(k)‖²/‖r(0)‖² over (1 − η)^k, for runs that the theorem does not cover.",
            rule=Equivalence(0.0, 1e-6),
            estimate=worst_by_seed,
            expected="open",
            reason="The conditions are sufficient, not necessary.",
            needs=widest,
            quantities=("excess_uncovered",),
        ),
        Claim(
            id=f"networks-rate-{network}",
            statement=f"The squared residual of the widest {network} network contracts by (1 − η)² per step.",
            source=f"{PAPER}, theorem 1 (theory file, claim 4, derived)",
            measured="Geometric mean over the steps of ‖r(k+1)‖²/‖r(k)‖², over (1 − η)², the mean over activations.",
            rule=Equivalence(1.0, 0.1),
            estimate=by_seed,
            expected="open",
            reason="It is the linear prediction, and the networks are not very wide.",
            needs=widest,
            quantities=("rate_ratio",),
        ),
    ]


def _claims(config: Config) -> list[Claim]:
    claims = _block_claims()
    for network in TRAINED:
        claims += [*(_drift_claim(network, activation) for activation in config.activation), *_theorem_claims(network)]
    return claims


PART = Part(NAME, _cells, _measure, _claims, seconds=lambda _: 0.1)
