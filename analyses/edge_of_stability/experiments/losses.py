"""Cross-entropy and squared error on the same network and data: the late drop of the sharpness (claim 8)."""

import torch
from torch import nn

from analyses.claims import claim
from analyses.edge_of_stability.config import Config
from analyses.edge_of_stability.descent import edge_of, gradient_descent
from analyses.edge_of_stability.points import memory, page, points
from analyses.edge_of_stability.setting import Setting, setting_of
from curvlab import study
from curvlab.problems.images import IMAGE_SETS

ETA = 1.0
"""Step size under cross-entropy."""
CE, MSE = "cross-entropy", "half-squared"


def uncertainty(setting: Setting, model: nn.Module) -> float:
    """Mean of p(1 − p) over samples and classes, the weight of the Gauss–Newton part under cross-entropy."""
    with torch.no_grad():
        p = model(setting.problem.train[0]).softmax(dim=1)
    return float((p * (1 - p)).mean())


def _measure(cell: study.Cell, context: study.Context[Config]) -> study.Observations:
    config = context.config
    setting = setting_of(cell, config)

    def weight(model: nn.Module) -> dict[str, float]:
        return {"weight": uncertainty(setting, model)}

    process = gradient_descent(setting, float(cell["eta"]), config.measured(), config.top, see=weight)
    edge = edge_of(process, config.steps)
    weights = edge.trace.series("weight")
    return [
        *edge.rows(),
        study.observed("late_share", edge.late_share),
        study.observed("weight_share", float(weights[-1] / weights[edge.sharpness.argmax()])),
        *(study.observed("weight", seen["weight"], step=seen["step"]) for seen in edge.measured),
    ]


def _claims(config: Config) -> list[study.Claim]:
    source, at_end = page("claim 8"), "Sharpness at the end over its maximum."
    squared = {"experiment": "training", "problem": tuple(IMAGE_SETS), "optimiser": "gd", "eta": config.middle}
    claims = [
        claim("late-drop-cross-entropy", source, study.Inequality("late_share", "less", 0.5, centre="geometric mean"),
              "Under cross-entropy the sharpness drops late in training to less than half of its maximum.",
              at_end,
              study.supported("p(1 − p) vanishes as the samples are fitted."), group="paper"),
        claim("late-drop-weight", source, study.Inequality("weight_share", "less", 0.5, centre="geometric mean"),
              "Where it drops, the mean of p(1 − p) has fallen to less than half.",
              "Mean of p(1 − p) at the end over that at the sharpest measurement.",
              study.supported("It is the weight of the Gauss–Newton part."), group="paper", given="late-drop-cross-entropy"),
        claim("late-drop-half-squared", source, study.Inequality("late_share", "greater", 0.5, centre="geometric mean"),
              "Under the squared error it does not: it ends above half of its maximum.",
              at_end,
              study.supported("The Gauss–Newton part has no such weight."), group="paper", at=squared),
    ]  # fmt: skip
    return claims if config.loss == MSE else claims[:2]


LOSSES: study.Experiment[Config] = study.Experiment(
    name="losses",
    cells=lambda config: points(config, [{"loss": CE, "eta": ETA}] if config.problem in IMAGE_SETS else []),
    measure=_measure,
    varies=("initialisation",),
    claims=_claims,
    seconds=2.5,
    memory=memory,
)
