"""The contraction of exact natural gradient through the optimiser, on the two-layer network of the theorems."""

from __future__ import annotations

import numpy as np
import torch

from analyses.estimates import by_seed, worst_by_seed
from analyses.part import Observations, where
from analyses.training.config import Config
from analyses.training.part import Part, cells_of
from curvlab import theory
from curvlab.optim import NaturalGradient
from curvlab.problems import resolve
from curvlab.study import Cell, Claim, Equivalence

NAME = "contraction"
PAPER = "Zhang, Martens & Grosse 2019"
WIDTH = 4096
RATES = (0.25, 0.5)
STEPS = 8
FLOOR = 1e-6
"""Steps count as long as ‖r‖ is above this share of ‖r(0)‖."""


def _cells(config: Config) -> list[Cell]:
    return cells_of(NAME, config.seeds, [{"eta": eta} for eta in RATES])


def _measure(cell: Cell, config: Config) -> Observations:
    eta = float(cell["eta"])
    problem = resolve("two-layer", width=WIDTH, seed=int(cell["seed"])).to(config.device)
    model, (x, y) = problem.model, problem.train
    optimiser = NaturalGradient(model, problem.loss, eta, structure="full", kind="exact", damping=0.0)
    squared = []
    for _ in range(STEPS):
        optimiser.zero_grad()
        with optimiser.collect():
            outputs = model(x)
            problem.loss(outputs, y).backward()
        squared.append(float((outputs.detach() - y).square().sum()))
        optimiser.step()
    with torch.no_grad():
        squared.append(float((model(x) - y).square().sum()))
    path = np.array(squared)
    ratios = (path[1:] / path[:-1])[path[:-1] > FLOOR**2 * path[0]]
    bound = theory.ngd_rate_bound(eta) ** np.arange(STEPS + 1)
    return [
        {"quantity": "excess", "value": max(0.0, float(np.max(path / path[0] - bound)))},
        {"quantity": "rate_ratio", "value": float(np.exp(np.log(ratios).mean())) / theory.ngd_linear_ratio(eta)},
        *({"quantity": "squared", "value": value / path[0], "step": step} for step, value in enumerate(path.tolist())),
    ]


def _claims(config: Config) -> list[Claim]:  # noqa: ARG001
    return [
        Claim(
            id="contraction-bound",
            statement="Exact natural gradient contracts ‖u − y‖² by 1 − η or more in every step, through the optimiser.",
            source=f"{PAPER}, theorem 1 (theory file, claim 3)",
            measured=f"Largest excess of ‖r(k)‖²/‖r(0)‖² over (1 − η)^k at η = 0.25 and 0.5, two-layer ReLU network of width "
            f"{WIDTH}.",
            rule=Equivalence(0.0, 1e-6),
            estimate=worst_by_seed,
            expected="supported",
            reason="It is a theorem where its conditions hold, and held beyond them in the Jacobian-rank analysis.",
            needs=where(NAME),
            quantities=("excess",),
        ),
        Claim(
            id="contraction-rate",
            statement="The squared residual of a wide network contracts by (1 − η)² per step.",
            source=f"{PAPER}, theorem 1 in the linear limit (theory file, claim 4, derived)",
            measured="Geometric mean over the steps of ‖r(k+1)‖²/‖r(k)‖², over (1 − η)², at both η.",
            rule=Equivalence(1.0, 0.1),
            estimate=by_seed,
            expected="supported",
            reason="The change of J is small at this width.",
            needs=where(NAME),
            quantities=("rate_ratio",),
        ),
    ]


PART = Part(NAME, _cells, _measure, _claims, seconds=lambda _: 0.3)
