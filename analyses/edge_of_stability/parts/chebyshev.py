"""Regression on a Chebyshev polynomial, small enough for the exact Hessian: the edge without an eigen-solver (claim 4)."""

from __future__ import annotations

import torch
from torch import nn

from analyses.edge_of_stability.config import Config
from analyses.edge_of_stability.descent import descend
from analyses.edge_of_stability.optimisers import momentum
from analyses.edge_of_stability.part import BAND, PAPER, REACHED, Part, must_reach, of
from analyses.edge_of_stability.parts.training import rows_of
from analyses.edge_of_stability.setting import setting_of
from analyses.edge_of_stability.windows import Edge
from analyses.estimates import identities
from analyses.part import Observations, where
from curvlab.spectrum import Hessian
from curvlab.study import Cell, Claim, Equivalence, Identity

NAME = "chebyshev"
DEGREE, ETA, STEPS, EVERY = 3, 0.25, 1600, 100
ROUND_OFF = 1e-9
"""Of a dense eigenvalue, relative to the largest."""


def _cells(config: Config) -> list[Cell]:
    at = {"part": NAME, "problem": NAME, "degree": DEGREE, "eta": ETA}
    return [Cell({**at, "seed": seed}) for seed in range(config.seeds)]


def _measure(cell: Cell, config: Config) -> Observations:
    setting, eta = setting_of(cell, config), float(cell["eta"])
    model = setting.network()
    size = sum(p.numel() for p in model.parameters())
    dense = Hessian(model, setting.problem.loss, setting.problem.train, sweep=size)
    exact: dict[int, float] = {}

    def observe(step: int, now: nn.Module) -> None:  # noqa: ARG001
        if step % EVERY == 0:
            matrix = dense.to_dense()
            exact[step] = float(torch.linalg.eigvalsh((matrix + matrix.T) / 2)[-1])

    optimiser = momentum(model, "gd", eta, 0.0)
    run = descend(model, setting, optimiser, STEPS, range(0, STEPS + 1, EVERY), top=config.top, observe=observe)
    rows = rows_of(run, Edge(run, optimiser.threshold, eta))
    for point in run.points:
        error = (point.eigenvalues[0] - exact[point.step]) / exact[point.step]
        tolerance = point.residual / exact[point.step] + ROUND_OFF
        rows.append({"quantity": "tracking_error", "value": error, "tolerance": tolerance, "step": point.step})
    return rows


def _claims(config: Config) -> list[Claim]:  # noqa: ARG001
    return [
        Claim(
            id="chebyshev-edge",
            statement=f"On T_{DEGREE} the sharpness of gradient descent at η = {ETA:g} rises to 2/η and hovers there.",
            source=f"{PAPER} (theory file, claim 4)",
            measured="Sharpness over the threshold, the mean over measurements from the first crossing to the end.",
            rule=Equivalence(1.0, BAND),
            estimate=of("plateau_ratio"),
            expected="supported",
            reason="The paper finds it on this task.",
            assumptions=must_reach,
            needs=where(NAME),
            quantities=("plateau_ratio", REACHED),
        ),
        Claim(
            id="chebyshev-tracking",
            statement="The sharpness that is tracked from the last eigenvectors is that of the dense Hessian.",
            source=f"{PAPER} (theory file, trap 10)",
            measured="Relative error at every measurement, against the residual bound.",
            rule=Identity(),
            estimate=identities,
            expected="supported",
            reason="An eigenvalue lies within the residual of the Ritz value; the block is wide enough to find the largest.",
            needs=where(NAME),
            quantities=("tracking_error",),
        ),
    ]


PART = Part(NAME, _cells, _measure, _claims, seconds=lambda _: 2.5)
