"""Regression on a Chebyshev polynomial, small enough for the exact Hessian: the edge without an eigen-solver (claim 4)."""

import torch
from torch import nn

from analyses.edge_of_stability.config import Config
from analyses.edge_of_stability.descent import Descent, descend
from analyses.edge_of_stability.optimisers import momentum
from analyses.edge_of_stability.points import BAND, PAPER, reaching
from analyses.edge_of_stability.setting import setting_of
from analyses.edge_of_stability.windows import Edge
from curvlab import study
from curvlab.spectrum import Hessian

NAME = "chebyshev"
"""Of the experiment and of its problem."""
DEGREE, ETA, STEPS, EVERY = 3, 0.25, 1600, 100
ROUND_OFF = 1e-9
"""Of a dense eigenvalue, relative to the largest."""


def _measure(cell: study.Cell, context: study.Context[Config]) -> study.Observations:
    setting, eta = setting_of(cell, context.config), float(cell["eta"])
    model = setting.network()
    size = sum(p.numel() for p in model.parameters())
    dense = Hessian(model, setting.problem.loss, setting.problem.train, chunk_size=size)

    def exact(_: nn.Module) -> dict[str, float]:
        matrix = dense.to_dense()
        return {"exact": float(torch.linalg.eigvalsh((matrix + matrix.T) / 2)[-1])}

    optimiser = momentum(model, "gd", eta)
    measured = range(0, STEPS + 1, EVERY)
    edge = Edge(
        descend(Descent(model, setting, optimiser, measured, context.config.top, exact), STEPS),
        optimiser.threshold,
        eta,
    )
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


POINTS = [{"problem": NAME, "degree": DEGREE, "eta": ETA}]


CLAIMS = [
    reaching(
        study.Claim(
            id="chebyshev-edge",
            statement=f"On T_{DEGREE} the sharpness of gradient descent at η = {ETA:g} rises to 2/η and hovers there.",
            rule=study.Equivalence("plateau_ratio", 1.0, BAND),
            source=f"{PAPER} (docs/theory/cohen_2021.md, claim 4)",
            measured="Sharpness over the threshold, the mean over measurements from the first crossing to the end.",
            expected=study.supported("The paper finds it on this task."),
        )
    ),
    study.Claim(
        id="chebyshev-tracking",
        statement="The sharpness that is tracked from the last eigenvectors is that of the dense Hessian.",
        rule=study.Identity("tracking_error"),
        source=f"{PAPER} (docs/theory/cohen_2021.md, trap 10)",
        measured="Relative error at every measurement, against the residual bound.",
        expected=study.supported(
            "An eigenvalue lies within the residual of the Ritz value; the block is wide enough to find the largest."
        ),
    ),
]


CHEBYSHEV: study.Experiment[Config] = study.Experiment(
    name=NAME, cells=POINTS, measure=_measure, claims=CLAIMS, seconds=2.5, memory=3e8
)
