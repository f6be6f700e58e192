"""Cross-entropy and squared error on the same network and data: the late drop of the sharpness (claim 8)."""

from __future__ import annotations

import torch
from torch import nn

from analyses.edge_of_stability.config import Config
from analyses.edge_of_stability.descent import descend
from analyses.edge_of_stability.optimisers import momentum
from analyses.edge_of_stability.part import PAPER, Part, cells_of
from analyses.edge_of_stability.parts.training import measured_steps, rows_of
from analyses.edge_of_stability.setting import Setting, setting_of
from analyses.edge_of_stability.windows import Edge
from analyses.estimates import by_seed
from analyses.part import Observations, where
from curvlab.problems.images import IMAGE_SETS
from curvlab.study import Cell, Claim, Inequality

NAME = "losses"
ETA = 1.0
"""Step size under cross-entropy."""
SHARE = 2
"""These runs take --steps over this."""
CE, MSE = "cross-entropy", "half-squared"


def _cells(config: Config) -> list[Cell]:
    if config.problem not in IMAGE_SETS:
        return []
    return cells_of(NAME, config, [{"loss": CE, "eta": ETA}])


def uncertainty(setting: Setting, model: nn.Module) -> float:
    """Mean of p(1 − p) over samples and classes, the weight of the Gauss–Newton part under cross-entropy."""
    with torch.no_grad():
        p = model(setting.problem.train[0]).softmax(dim=1)
    return float((p * (1 - p)).mean())


def _measure(cell: Cell, config: Config) -> Observations:
    setting, eta, steps = setting_of(cell, config), float(cell["eta"]), config.steps // SHARE
    model = setting.network()
    optimiser = momentum(model, "gd", eta, 0.0)
    weights: dict[int, float] = {}
    shown = measured_steps(config, steps)

    def observe(step: int, now: nn.Module) -> None:
        if step in shown:
            weights[step] = uncertainty(setting, now)

    run = descend(model, setting, optimiser, steps, shown, top=config.top, observe=observe)
    edge = Edge(run, optimiser.threshold, eta)
    rows = rows_of(run, edge)
    rows.append({"quantity": "late_share", "value": float(edge.sharpness[-1] / edge.sharpness.max())})
    top = int(edge.steps[edge.sharpness.argmax()])
    rows.append({"quantity": "weight_share", "value": weights[int(edge.steps[-1])] / weights[top]})
    rows += [{"quantity": "weight", "value": weight, "step": step} for step, weight in weights.items()]
    return rows


def _claims(config: Config) -> list[Claim]:
    if config.problem not in IMAGE_SETS:
        return []

    def claim(id_: str, statement: str, measured: str, rule: Inequality, quantity: str, reason: str) -> Claim:
        of_error = id_ == "late-drop-half-squared"
        return Claim(
            id=id_,
            statement=statement,
            source=f"{PAPER} (theory file, claim 8)",
            measured=measured,
            rule=rule,
            estimate=by_seed,
            expected="supported",
            reason=reason,
            needs=where("training", optimiser="gd", eta=config.middle) if of_error else where(NAME),
            quantities=(quantity,),
        )

    at_end = "Sharpness at the end over its maximum."
    claims = [
        claim(
            "late-drop-cross-entropy",
            "Under cross-entropy the sharpness drops late in training to less than half of its maximum.",
            at_end,
            Inequality(0.5, "less"),
            "late_share",
            "p(1 − p) vanishes as the samples are fitted.",
        ),
        claim(
            "late-drop-weight",
            "Where it drops, the mean of p(1 − p) has fallen to less than half.",
            "Mean of p(1 − p) at the end over that at the sharpest measurement.",
            Inequality(0.5, "less"),
            "weight_share",
            "It is the weight of the Gauss–Newton part.",
        ),
    ]
    if config.loss == MSE:
        claims.append(
            claim(
                "late-drop-half-squared",
                "Under the squared error it does not: it ends above half of its maximum.",
                at_end,
                Inequality(0.5, "greater"),
                "late_share",
                "The Gauss–Newton part has no such weight.",
            )
        )
    return claims


PART = Part(NAME, _cells, _measure, _claims, seconds=lambda _: 2.5)
