"""Natural gradient on networks with all layers trained: stability, rate, and the rank of single layers and units on the way."""

from functools import partial
from itertools import product

import numpy as np
import torch

from analyses.claims import claim
from analyses.jacobian_rank.config import Config
from analyses.jacobian_rank.descent import contraction, excess, ranks_and_active, watch
from analyses.jacobian_rank.networks import TRAINED, UNITS, network_setting
from analyses.jacobian_rank.points import DRIFTS, experiment, page
from analyses.jacobian_rank.setting import BOUND_TOLERANCE
from analyses.specs import classifies_nodes
from curvlab import study, theory
from curvlab.fisher import Full
from curvlab.rows import Rows
from curvlab.rows.layer import LayerRows
from curvlab.spectrum import rank

FACTORS = (0.25, 1, 4, 16)
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
        study.observed("missing", inspected[0].deficiency),
        study.observed("rate_ratio", contraction(squared) / theory.ngd_linear_ratio(ETA)),
    ]
    covered = False
    if setting.full_rank:
        C = setting.stability_constant(inspected)
        covered = theory.largest_step(C) >= ETA
        rows += [
            study.observed("constant", C),
            study.observed("change_share", setting.change_share(inspected)),
            study.observed("lost", max(one.deficiency for one in inspected)),
        ]
    status = study.outside("theorem 1 covers the run") if covered else {}
    above = excess(squared, theory.ngd_rate_bound(ETA))
    rows.append(study.observed("excess", above, **status))
    if cell["units"] == UNITS[str(cell["network"])]:
        rows += _layers(seen) + _units(seen[0], seen[-1])
    return rows


def _layers(seen: list[Rows]) -> list[dict[str, object]]:
    """Rows missing in the rank of single layers on the way; layers with fewer parameters than rows are left out."""
    R = seen[0].R

    def missing(layer: LayerRows) -> int:
        return max(R - rank(rows, parameters=layer.layout.names).rank for rows in seen)

    layers = [layer for layer in seen[0].layers if layer.size >= R]
    return [study.observed("layer_missing", missing(layer), layer=layer.name) for layer in layers]


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
    return ranks_and_active(layer.unit_stack()[chosen])


UNIT_WISE = page("condition 1", "claim 1, for unit-wise blocks")


def _rank_claims() -> list[study.Claim]:
    never = partial(study.Always, direction="less", bound=0.0)
    return [
        claim("networks-initial", page("condition 1", "claim 1"), never("missing"),
              "Networks with all layers trained have full row rank at initialisation also where they are narrow.",
              "Share of the rows missing in the rank of J(0).",
              study.refuted("Each of 2 channels can be inactive at all positions of a sample, whose row is then zero.",
                            explored=12),
              group="derived"),
        claim("networks-kept", page("conditions 1 and 2", "claims 1 and 2"), never("lost"),
              "Networks with all layers trained that have full row rank keep it along natural gradient, at every width.",
              f"Share of the rows missing in the rank of J after each of {STEPS} steps at η = {ETA:g}.",
              study.refuted("Steps of narrow networks are long, and can put out all units of a sample.", explored=12),
              group="derived"),
        claim("networks-layers", page("condition 1", "claim 1, for layer-wise blocks"), never("layer_missing"),
              "Every single layer of these networks keeps full row rank along natural gradient.",
              "Rows missing in the rank of a layer's Jacobian at any step.",
              study.refuted("Steps that change J by more than its norm make activation patterns alike, so that fewer features than "
                            "rows can remain active. Layers with fewer parameters than rows are left out.", explored=12),
              group="derived"),
        claim("networks-units", UNIT_WISE, study.Identity("unit_surprise"),
              "The row rank of a single unit is the number of samples on which it is active, up to its parameters, before and "
              "after training.",
              "Largest difference between the two over units of every layer.",
              study.refuted("A sample's row is zero where the unit is not active, but after long steps its inputs need not be in "
                            "general position.", explored=12),
              group="derived"),
        claim("networks-units-kept", UNIT_WISE, study.Equivalence("unit_rank", 0.0, 0.02, centre="mean"),
              "Training leaves the mean row rank of single units as it was.",
              "Mean over units, layers and networks of row rank over what is attainable, after training less before.",
              study.supported("Few activation patterns flip, about as many on as off."), group="exploration",
              estimate=partial(study.difference_by_seed, column="when", first="trained", second="initial")),
        claim("networks-uncovered", page("condition 2", "claim 2"), study.Always("constant", "greater", 0.5),
              "Theorem 1 covers none of these runs: condition 2 does not hold along any, at any width.",
              "C_emp along the run; condition 2 wants it below ½.",
              study.supported("It takes far wider layers already on the two-layer network.", explored=12),
              group="exploration", bound_from="condition 2"),
    ]  # fmt: skip


def _drift(network: str, activation: str) -> study.Claim:
    units = tuple(int(factor * UNITS[network]) for factor in FACTORS if factor >= 1)
    return claim(
        f"networks-drift-{network}-{activation}", page("section 4", "claim 9, for all layers trained"),
        study.Inequality("change_share", "less", 0.0, centre="mean"),
        f"Along natural gradient the relative change of the Jacobian of the {network} network falls with its width, with "
        f"{activation}.",
        f"Slope of log max_k ‖J(k) − J(0)‖_F/‖J(0)‖_F at η = {ETA:g} against log m, m from {units[0]} to {units[-1]} units "
        "or channels.",
        study.supported(f"It falls as m^({DRIFTS[activation][0]:g}) once it is small, for the reasons of two layers."),
        group="derived", bound_from="0: no change with the width",
        at={"network": network, "activation": activation, "units": units},
        estimate=partial(study.slope_by_seed, against="units"),
    )  # fmt: skip


def _rates(network: str) -> list[study.Claim]:
    at = {"network": network, "units": int(FACTORS[-1] * UNITS[network])}
    return [
        claim(f"networks-bound-{network}", page("theorem 1: the converse is not claimed", "claim 2"),
              study.Always("excess", "less", BOUND_TOLERANCE),
              f"The bound of theorem 1, (1 − η)^k, holds at every step on the widest {network} network, which the theorem does not "
              "cover.",
              "Largest excess of ‖r(k)‖²/‖r(0)‖² over (1 − η)^k, for runs that the theorem does not cover.",
              study.undecided("The conditions are sufficient, not necessary."), group="exploration", at=at),
        claim(f"networks-rate-{network}", page("theorem 1", "claim 4, for all layers trained"),
              study.Equivalence("rate_ratio", 1.0, 0.1, centre="geometric mean"),
              f"The squared residual of the widest {network} network contracts by (1 − η)² per step.",
              "Geometric mean over the steps and activations of ‖r(k+1)‖²/‖r(k)‖², over (1 − η)².",
              study.undecided("It is the linear prediction, and the networks are not very wide."),
              group="exploration", at=at, estimate=study.geometric_by_seed),
    ]  # fmt: skip


def _claims(config: Config) -> list[study.Claim]:
    claims = _rank_claims()
    for network in TRAINED:
        claims += [*(_drift(network, activation) for activation in config.activation), *_rates(network)]
    return claims


NETWORKS = experiment(_points, name="networks", measure=_measure, claims=_claims, seconds=0.25)
