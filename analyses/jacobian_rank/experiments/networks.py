"""Natural gradient on networks with all layers trained: stability, rate, and the rank of single layers and units on the way."""

from functools import partial
from itertools import product
from math import log10

import numpy as np
import torch

from analyses.claims import claim
from analyses.jacobian_rank.config import Config
from analyses.jacobian_rank.descent import contraction, excess, watch
from analyses.jacobian_rank.networks import TRAINED, UNITS, network_setting
from analyses.jacobian_rank.points import DRIFTS, PAPER, experiment, page, worst_decade_by_seed
from analyses.jacobian_rank.setting import BOUND_TOLERANCE
from analyses.specs import classifies_nodes
from curvlab import study, theory
from curvlab.fisher import Full
from curvlab.rows import Rows
from curvlab.rows.layer import LayerRows
from curvlab.spectrum import rank

FACTORS = (0.25, 1, 4)
"""Hidden units or channels, in those of the other experiments."""
ETA, STEPS = 0.5, 4
CHOSEN = 16
"""Units of a layer whose blocks are looked at."""


def _points(config: Config) -> list[study.Point]:
    if classifies_nodes(config.problem):
        return []
    at = {"width": config.swept_widths[0]}
    return [
        {**at, "network": network, "units": int(factor * UNITS[network]), "activation": activation}
        for network, activation, factor in product(TRAINED, config.activation, FACTORS)
    ]


def _measure(cell: study.Cell, context: study.Context[Config]) -> study.Observations:
    setting = network_setting(cell, context.config)
    path, seen = watch(setting, Full(), ETA, STEPS, see=lambda jacobian: jacobian)
    inspected = [setting.inspect(jacobian) for jacobian in seen]
    squared = setting.squared_residuals(path)
    rows = [
        study.observed("missing", inspected[0].deficiency, tolerance=0.0),
        study.observed("rate_ratio", contraction(squared) / theory.ngd_linear_ratio(ETA)),
    ]
    covered = False
    if setting.full_rank:
        C = setting.stability_constant(inspected)
        covered = theory.largest_step(C) >= ETA
        rows += [
            study.observed("constant", C),
            study.observed("change_share", setting.change_share(inspected)),
            study.observed("lost", max(one.deficiency for one in inspected), tolerance=0.0),
        ]
    status = study.outside("theorem 1 covers the run") if covered else {}
    above = excess(squared, theory.ngd_rate_bound(ETA))
    rows.append(study.observed("excess", above, tolerance=BOUND_TOLERANCE, **status))
    if cell["units"] == UNITS[str(cell["network"])]:
        rows += _layers(seen) + _units(seen[0], seen[-1])
    return rows


def _layers(seen: list[Rows]) -> list[dict[str, object]]:
    """Rows missing in the rank of single layers on the way; layers with fewer parameters than rows are left out."""
    R = seen[0].R

    def missing(layer: LayerRows) -> int:
        return max(R - rank(rows, parameters=layer.layout.names).rank for rows in seen)

    layers = [layer for layer in seen[0].layers if layer.size >= R]
    return [study.observed("layer_missing", missing(layer), tolerance=0.0, layer=layer.name) for layer in layers]


def _units(start: Rows, end: Rows) -> list[dict[str, object]]:
    """Row rank of single units before the first step and after the last."""
    rows = []
    for first, last in zip(start.layers, end.layers, strict=True):
        at = {"layer": first.name}
        (before, before_active), (after, after_active) = _unit_ranks(first), _unit_ranks(last)
        surprises = np.abs(np.concatenate([before - before_active, after - after_active]))
        attainable = min(start.R, first.layout.width)
        rows += [
            study.observed("unit_surprise", int(surprises.max()), tolerance=0.0, **at),
            study.observed("unit_rank", float(before.mean()) / attainable, when="initial", **at),
            study.observed("unit_rank", float(after.mean()) / attainable, when="trained", **at),
        ]
    return rows


def _unit_ranks(layer: LayerRows) -> tuple[np.ndarray, np.ndarray]:
    """Ranks of the blocks of some units, and the samples on which these are active, at most the unit's parameters."""
    chosen = torch.linspace(0, layer.layout.units - 1, min(CHOSEN, layer.layout.units)).long()
    blocks = layer.unit_stack()[chosen]
    active = (blocks != 0).any(-1).sum(-1).clamp_max(layer.layout.width)
    return np.asarray(torch.linalg.matrix_rank(blocks).numpy(force=True)), np.asarray(active.numpy(force=True))


def _rank_claims() -> list[study.Claim]:
    return [
        claim("networks-initial", page(f"{PAPER}, condition 1", "claim 1"), study.Identity("missing"),
              "Networks with all layers trained have full row rank at initialisation also where they are narrow.",
              "Share of the rows missing in the rank of J(0).",
              study.refuted("P is above the number of rows, but an earlier run found convolutional networks with 2 channels "
                            "that are dead.")),
        claim("networks-kept", page(f"{PAPER}, conditions 1 and 2", "claims 1 and 2"), study.Identity("lost"),
              "Networks with all layers trained that have full row rank keep it along natural gradient, at every width.",
              f"Share of the rows missing in the rank of J after each of {STEPS} steps at η = {ETA:g}.",
              study.refuted("P is above the number of rows, but an earlier run found narrow networks that lose active units "
                            "in training.")),
        claim("networks-layers", f"{PAPER}, condition 1, for layer-wise blocks (derived)", study.Identity("layer_missing"),
              "Every single layer of these networks keeps full row rank along natural gradient.",
              "Rows missing in the rank of a layer's Jacobian at any step.",
              study.refuted("An earlier run found residual networks in which the samples' activation patterns become alike, "
                            "so that fewer features than rows are ever active. Layers with fewer parameters than rows are "
                            "left out.")),
        claim("networks-units", f"{PAPER}, condition 1, for unit-wise blocks (derived)", study.Identity("unit_surprise"),
              "The row rank of a single unit is the number of samples on which it is active, up to its number of parameters, "
              "before and after training.",
              "Largest difference between the two over units of every layer.",
              study.refuted("A sample's row is zero where the unit is not active, and inputs are in general position, but "
                            "an earlier run found residual networks with fewer active inputs than samples after training.")),
        claim("networks-units-kept", f"{PAPER}, condition 1, for unit-wise blocks (derived)",
              study.Equivalence("unit_rank", 0.0, 0.02),
              "Training leaves the mean row rank of single units as it was.",
              "Mean over units, layers and networks of row rank over what is attainable, after training less before.",
              study.supported("Few activation patterns flip, about as many on as off."),
              estimate=partial(study.difference_by_seed, column="when", first="trained", second="initial")),
    ]  # fmt: skip


def _drift_expected(network: str, activation: str) -> study.Expected:
    if activation == "relu":
        return study.undecided(
            "Patterns flip as in the two-layer network, but trained layers above add a part of order m^(−1/2)."
        )
    if network == "residual":
        return study.refuted("An earlier run found that J changes by several times its norm, far from the limit.")
    return study.supported("Pre-activations and the weights above them change by O(m^(−1/2)) of their size.")


def _drift(network: str, activation: str) -> study.Claim:
    exponent, _ = DRIFTS[activation]
    return claim(
        f"networks-drift-{network}-{activation}", page(f"{PAPER}, section 4", "claim 9, for all layers trained"),
        study.Equivalence("change_share", exponent, 0.05),
        f"Along natural gradient the relative change of the Jacobian of the {network} network falls as m^({exponent:g}) with "
        f"{activation}.",
        f"Slope of log max_k ‖J(k) − J(0)‖_F/‖J(0)‖_F at η = {ETA:g} against log m, m hidden units or channels, over "
        "networks with full row rank at initialisation.",
        _drift_expected(network, activation), at={"network": network, "activation": activation},
        estimate=partial(study.slope_by_seed, against="units"),
    )  # fmt: skip


def _theorem_claims(network: str) -> list[study.Claim]:
    widest = {"network": network, "units": int(FACTORS[-1] * UNITS[network])}
    return [
        claim(f"networks-stable-{network}", page(f"{PAPER}, condition 2", "claim 2"),
              study.Inequality("constant", "less", log10(0.5)),
              f"Condition 2 holds along natural gradient on the widest {network} network.",
              "log10 of C_emp along the run, the largest over activations; condition 2 wants C_emp below ½.",
              study.refuted("It takes far wider layers already on the two-layer network."), at=widest,
              estimate=worst_decade_by_seed),
        claim(f"networks-bound-{network}", page(f"{PAPER}, theorem 1: the converse is not claimed", "claim 2"),
              study.Equivalence("excess", 0.0, 1e-6),
              f"The bound of theorem 1, (1 − η)^k, holds on the widest {network} network where the theorem's conditions do "
              "not.",
              "Largest excess of ‖r(k)‖²/‖r(0)‖² over (1 − η)^k, for runs that the theorem does not cover.",
              study.undecided("The conditions are sufficient, not necessary."), at=widest, estimate=study.worst_by_seed),
        claim(f"networks-rate-{network}", page(f"{PAPER}, theorem 1", "claim 4, derived"),
              study.Equivalence("rate_ratio", 1.0, 0.1),
              f"The squared residual of the widest {network} network contracts by (1 − η)² per step.",
              "Geometric mean over the steps of ‖r(k+1)‖²/‖r(k)‖², over (1 − η)², the mean over activations.",
              study.undecided("It is the linear prediction, and the networks are not very wide."), at=widest),
    ]  # fmt: skip


def _claims(config: Config) -> list[study.Claim]:
    claims = _rank_claims()
    for network in TRAINED:
        claims += [*(_drift(network, activation) for activation in config.activation), *_theorem_claims(network)]
    return claims


NETWORKS = experiment(_points, name="networks", measure=_measure, claims=_claims, seconds=0.1)
