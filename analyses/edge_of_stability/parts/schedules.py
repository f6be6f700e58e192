"""Starts above the threshold, and a step size that is lowered at the edge (claims 9 and 10)."""

from __future__ import annotations

import numpy as np
import torch

from analyses.edge_of_stability.config import Config
from analyses.edge_of_stability.descent import TOLERANCE, descend
from analyses.edge_of_stability.optimisers import momentum
from analyses.edge_of_stability.part import BAND, PAPER, REACHED, Part, cells_of, must_reach, of
from analyses.edge_of_stability.parts.training import measured_steps, rows_of
from analyses.edge_of_stability.setting import Setting, setting_of
from analyses.edge_of_stability.windows import Edge
from analyses.estimates import by_seed
from analyses.part import Observations, where
from curvlab.spectrum import eigenpairs
from curvlab.study import Cell, Claim, Equivalence, Inequality

NAME = "schedules"
FACTORS = (1.2, 1.6)
"""S(0) over 2/η of the runs that start above the threshold."""
EARLY = 50
"""Steps in which the sharpness is to fall to the threshold."""
FINE = 5
"""Steps between measurements until then."""
SHARE = 3
"""These runs take --steps over this."""


def _cells(config: Config) -> list[Cell]:
    points: list[dict[str, object]] = [{"schedule": "catapult", "factor": factor} for factor in FACTORS]
    if len(config.etas) > 1:
        points.append({"schedule": "drop", "factor": 0.0})
    return cells_of(NAME, config, points)


def _measure(cell: Cell, config: Config) -> Observations:
    setting = setting_of(cell, config)
    return _drop(setting, config) if cell["schedule"] == "drop" else _catapult(setting, float(cell["factor"]), config)


def _catapult(setting: Setting, factor: float, config: Config) -> list[dict[str, object]]:
    model, steps = setting.network(), config.steps // SHARE
    initial = float(eigenpairs(setting.hessian(model), 1, tolerance=TOLERANCE).values[0])
    eta = factor * 2.0 / initial
    optimiser = momentum(model, "gd", eta, 0.0)
    measured = sorted({*range(0, EARLY + 1, FINE), *measured_steps(config, steps)})
    run = descend(model, setting, optimiser, steps, measured, top=config.top)
    edge = Edge(run, optimiser.threshold, eta)
    rows = [row for row in rows_of(run, edge) if "step" in row or row["quantity"] == "diverged"]
    rows.append({"quantity": "survived", "value": float(run.diverged is None)})
    early = edge.ratio[(edge.steps > 0) & (edge.steps <= EARLY)]
    if len(early):
        rows.append({"quantity": "lowest", "value": float(early.min())})
    if run.diverged is None:
        rows.append({"quantity": "late_ratio", "value": float(edge.ratio[edge.steps >= steps // 2].mean())})
    return rows


def _drop(setting: Setting, config: Config) -> list[dict[str, object]]:
    model, steps = setting.network(), config.steps // SHARE
    first, last = max(config.etas), min(config.etas)
    optimiser = momentum(model, "gd", first, 0.0)
    assert isinstance(optimiser.steps, torch.optim.SGD)
    groups = optimiser.steps.param_groups

    def before(step: int) -> None:
        groups[0]["lr"] = first if step < steps else last

    run = descend(
        model, setting, optimiser, 2 * steps, measured_steps(config, 2 * steps), top=config.top, before=before
    )
    old, new = Edge(run, 2 / first, first), Edge(run, 2 / last, last)
    rows = [row for row in rows_of(run, new) if "step" in row or row["quantity"] == "diverged"]
    plateau = old.ratio[(old.steps >= steps // 2) & (old.steps < steps)]
    reached = bool(len(plateau)) and bool((old.ratio[old.steps < steps] >= 1).any())
    rows.append({"quantity": REACHED, "value": float(reached)})
    if reached and run.diverged is None:
        late = new.sharpness[new.steps >= 3 * steps // 2]
        rows += [
            {"quantity": "resumed", "value": float(np.log(late.mean() / (plateau.mean() * 2 / first)))},
            {"quantity": "new_ratio", "value": float(late.mean() / new.threshold)},
        ]
    return rows


def _claims(config: Config) -> list[Claim]:
    claims = []
    for factor in FACTORS:
        at, where_ = where(NAME, schedule="catapult", factor=factor), f"that starts at {factor:g} times its threshold"
        claims += [
            Claim(
                id=f"catapult-falls-{factor:g}",
                statement=f"Gradient descent {where_} first falls to the threshold or below.",
                source=f"{PAPER} (theory file, claim 9)",
                measured=f"Least sharpness over the threshold in the first {EARLY} steps.",
                rule=Inequality(1.0, "less"),
                estimate=by_seed,
                expected="supported",
                reason="Divergence along the top eigenvector is stopped by falling curvature.",
                needs=at,
                quantities=("lowest",),
            ),
            Claim(
                id=f"catapult-survives-{factor:g}",
                statement=f"Gradient descent {where_} does not diverge.",
                source=f"{PAPER} (theory file, claim 9)",
                measured="Share of the runs that end with a loss below a hundred times the first.",
                rule=Inequality(0.5, "greater"),
                estimate=by_seed,
                expected="open",
                reason="It is known for factors below about two, on other networks.",
                needs=at,
                quantities=("survived",),
            ),
            Claim(
                id=f"catapult-edge-{factor:g}",
                statement=f"Gradient descent {where_} ends up hovering there.",
                source=f"{PAPER} (theory file, claim 9)",
                measured="Mean sharpness over the threshold in the second half of the run.",
                rule=Equivalence(1.0, BAND),
                estimate=of("late_ratio"),
                expected="supported",
                reason="It behaves as every other run then.",
                needs=at,
                quantities=("late_ratio", "survived"),
            ),
        ]
    if len(config.etas) < 2:
        return claims
    at = where(NAME, schedule="drop")
    step = f"lowered from {max(config.etas):g} to {min(config.etas):g} at the edge"
    return [
        *claims,
        Claim(
            id="drop-resumes",
            statement=f"With η {step}, progressive sharpening resumes.",
            source=f"{PAPER} (theory file, claim 10)",
            measured="Log of the mean sharpness in the last quarter of the run over that in the second, before the change.",
            rule=Inequality(0.0, "greater"),
            estimate=of("resumed"),
            expected="supported",
            reason="The new threshold is higher.",
            assumptions=must_reach,
            needs=at,
            quantities=("resumed", REACHED),
        ),
        Claim(
            id="drop-edge",
            statement=f"With η {step}, the sharpness goes up to the new 2/η.",
            source=f"{PAPER} (theory file, claim 10)",
            measured="Mean sharpness over the new threshold in the last quarter of the run.",
            rule=Equivalence(1.0, BAND),
            estimate=of("new_ratio"),
            expected="supported",
            reason="It behaves as every other run then.",
            assumptions=must_reach,
            needs=at,
            quantities=("new_ratio", REACHED),
        ),
    ]


PART = Part(NAME, _cells, _measure, _claims, seconds=lambda _: 3.0)
