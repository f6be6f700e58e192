"""Regression on a Chebyshev polynomial, small enough for the exact Hessian: the edge without an eigen-solver (claim 4)."""

from functools import partial

import torch
from torch import nn

from analyses.claims import claim
from analyses.edge_of_stability.config import Config
from analyses.edge_of_stability.descent import edge_of, gradient_descent
from analyses.edge_of_stability.points import HOVERING, HOVERS, page, settled
from analyses.edge_of_stability.setting import Setting, setting_of
from curvlab import study
from curvlab.spectrum import Hessian

NAME = "chebyshev"
"""Of the experiment and of its problem."""
DEGREES, ETA, STEPS, EVERY = (3, 4, 5), 0.25, 4000, 125
ROUND_OFF = 1e-9
"""Of a dense eigenvalue, relative to the largest."""


def _exact(setting: Setting, model: nn.Module) -> dict[str, float]:
    size = sum(p.numel() for p in model.parameters())
    matrix = Hessian(model, setting.problem.loss, setting.problem.train, chunk_size=size).to_dense()
    return {"exact": float(torch.linalg.eigvalsh((matrix + matrix.T) / 2)[-1])}


def _measure(cell: study.Cell, context: study.Context[Config]) -> study.Observations:
    setting = setting_of(cell, context.config)
    measured = range(0, STEPS + 1, EVERY)
    see = partial(_exact, setting)
    edge = edge_of(gradient_descent(setting, float(cell["eta"]), measured, context.config.top, see=see), STEPS)
    tracked = [
        study.observed(
            "tracking_error",
            (seen["sharpness"] - seen["exact"]) / seen["exact"],
            tolerance=seen["residual"] / seen["exact"] + ROUND_OFF,
            step=seen["step"],
        )
        for seen in edge.measured
    ]
    return [*edge.rows(), *tracked]


CLAIMS = [
    *(
        claim(f"chebyshev-edge-{degree}", page("claim 4"), HOVERS,
              f"On T_{degree} the sharpness of gradient descent at η = {ETA:g} rises to 2/η and hovers there.",
              HOVERING, settled("The paper finds it on this task."), group="paper", at={"degree": degree})
        for degree in DEGREES
    ),
    claim("chebyshev-tracking", page("trap 10"), study.Identity("tracking_error"),
          "The sharpness that is tracked from the last eigenvectors is that of the dense Hessian.",
          "Relative error at every measurement, against the residual bound.",
          study.supported("An eigenvalue lies within the residual of the Ritz value; the block is wide enough to find the "
                          "largest."), group="self-check"),
]  # fmt: skip

CHEBYSHEV: study.Experiment[Config] = study.Experiment(
    name=NAME,
    cells=[{"problem": NAME, "degree": degree, "eta": ETA} for degree in DEGREES],
    measure=_measure,
    varies=("initialisation",),
    claims=CLAIMS,
    seconds=2.5,
    memory=3e8,
)
