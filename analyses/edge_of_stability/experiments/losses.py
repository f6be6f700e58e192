"""Cross-entropy and squared error on the same network and data: the late drop of the sharpness (claim 8)."""

import torch
from torch import nn

from analyses.edge_of_stability.config import Config
from analyses.edge_of_stability.descent import Descent, descend
from analyses.edge_of_stability.optimisers import momentum
from analyses.edge_of_stability.points import PAPER, memory, points
from analyses.edge_of_stability.setting import Setting, setting_of
from analyses.edge_of_stability.windows import Edge
from curvlab import study
from curvlab.problems.images import IMAGE_SETS

ETA = 1.0
"""Step size under cross-entropy."""
SHARE = 2
"""These runs take --steps over this."""
CE, MSE = "cross-entropy", "half-squared"


def uncertainty(setting: Setting, model: nn.Module) -> float:
    """Mean of p(1 − p) over samples and classes, the weight of the Gauss–Newton part under cross-entropy."""
    with torch.no_grad():
        p = model(setting.problem.train[0]).softmax(dim=1)
    return float((p * (1 - p)).mean())


def _measure(cell: study.Cell, context: study.Context[Config]) -> study.Observations:
    config = context.config
    setting, eta, steps = setting_of(cell, config), float(cell["eta"]), config.steps // SHARE

    def weight(model: nn.Module) -> dict[str, float]:
        return {"weight": uncertainty(setting, model)}

    model = setting.network()
    optimiser = momentum(model, "gd", eta)
    trace = descend(Descent(model, setting, optimiser, config.measured(steps), config.top, weight), steps)
    edge = Edge(trace, optimiser.threshold, eta)
    weights = trace.series("weight")
    return [
        *edge.rows(),
        study.observed("late_share", float(edge.sharpness[-1] / edge.sharpness.max())),
        study.observed("weight_share", float(weights[-1] / weights[edge.sharpness.argmax()])),
        *(study.observed("weight", seen["weight"], step=seen["step"]) for seen in edge.measured),
    ]


def _claims(config: Config) -> list[study.Claim]:
    source, at_end = f"{PAPER} (docs/theory/cohen_2021.md, claim 8)", "Sharpness at the end over its maximum."
    claims = [
        study.Claim(
            id="late-drop-cross-entropy",
            statement="Under cross-entropy the sharpness drops late in training to less than half of its maximum.",
            rule=study.Inequality("late_share", "less", 0.5),
            source=source,
            measured=at_end,
            expected=study.supported("p(1 − p) vanishes as the samples are fitted."),
        ),
        study.Claim(
            id="late-drop-weight",
            statement="Where it drops, the mean of p(1 − p) has fallen to less than half.",
            rule=study.Inequality("weight_share", "less", 0.5),
            source=source,
            measured="Mean of p(1 − p) at the end over that at the sharpest measurement.",
            expected=study.supported("It is the weight of the Gauss–Newton part."),
        ),
    ]
    if config.loss == MSE:
        claims.append(
            study.Claim(
                id="late-drop-half-squared",
                statement="Under the squared error it does not: it ends above half of its maximum.",
                rule=study.Inequality("late_share", "greater", 0.5),
                source=source,
                measured=at_end,
                expected=study.supported("The Gauss–Newton part has no such weight."),
                at={"experiment": "training", "problem": tuple(IMAGE_SETS), "optimiser": "gd", "eta": config.middle},
            )
        )
    return claims


LOSSES: study.Experiment[Config] = study.Experiment(
    name="losses",
    cells=lambda config: points(config, [{"loss": CE, "eta": ETA}] if config.problem in IMAGE_SETS else []),
    measure=_measure,
    claims=_claims,
    seconds=2.5,
    memory=memory,
)
