"""The largest eigenvalue of every approximation along gradient descent: how well it predicts the Hessian's."""

from collections.abc import Iterator

import numpy as np
import torch
from torch import nn

from analyses.claims import claim
from analyses.edge_of_stability.config import Config
from analyses.edge_of_stability.descent import descend, gradient_descent
from analyses.edge_of_stability.points import PAPER, memory, points
from analyses.edge_of_stability.setting import Setting, setting_of
from analyses.edge_of_stability.windows import divergence
from curvlab import study
from curvlab.fisher import make
from curvlab.rows import sqrt_fisher
from curvlab.rows.loss import Kind
from curvlab.spectrum import Eigenpairs, Operator, RowsOperator, StructureOperator, eigenpairs

CHECKPOINTS = 10
TOLERANCE = 1e-2
"""Of the residuals; the eigenvalues' error is about its square over their distance, relative to the largest."""
KINDS: tuple[Kind, ...] = ("mc", "empirical")
"""Fisher matrices besides the exact one, which is the full structure."""
EXPECTED = {
    "full": study.supported("The residual part of the Hessian is small where the loss is."),
    "block-diagonal": study.undecided(
        "Its largest eigenvalue is at most the full one, and at least that over the number of layers."
    ),
}
CLOSE = 0.1
"""Relative distance from the Hessian's largest eigenvalue that counts as predicting it."""


def _operators(setting: Setting, model: nn.Module, config: Config, seed: int) -> Iterator[tuple[str, Operator]]:
    """Yield what stands for the Hessian, by name."""
    loss, (inputs, targets) = setting.problem.loss, setting.problem.train
    yield "hessian", setting.hessian(model)
    rows = sqrt_fisher(model, loss, inputs, targets)
    for structure in config.structures:
        yield structure, StructureOperator(make(structure).update(rows))
    for kind in KINDS:
        generator = torch.Generator(inputs.device).manual_seed(seed) if kind == "mc" else None
        yield kind, RowsOperator(sqrt_fisher(model, loss, inputs, targets, kind, generator=generator))


def _measure(cell: study.Cell, context: study.Context[Config]) -> study.Observations:
    config, seed = context.config, int(cell["seed"])
    setting = setting_of(cell, config)
    last: dict[str, Eigenpairs] = {}

    def largest(model: nn.Module) -> dict[str, dict[str, float]]:
        for name, operator in _operators(setting, model, config, seed):
            last[name] = eigenpairs(operator, 1, start=last.get(name), tolerance=TOLERANCE, block=4)
        return {"largest": {name: float(found.values[0]) for name, found in last.items()}}

    shown = np.unique(np.linspace(0, config.steps, CHECKPOINTS).round().astype(int)).tolist()
    trace = descend(gradient_descent(setting, float(cell["eta"]), shown, top=0, see=largest), config.steps)
    measured = [seen for seen in trace.seen if "largest" in seen]
    rows = divergence(trace)
    rows += [
        study.observed("largest", value, approximation=name, step=seen["step"])
        for seen in measured
        for name, value in seen["largest"].items()
    ]
    for name in last:
        ratios = np.array([seen["largest"][name] / seen["largest"]["hessian"] for seen in measured])
        rows += [
            study.observed(f"late_ratio_{name}", float(ratios[len(ratios) // 2 :].mean())),
            # The spread of log ratios says whether a constant factor would mend the prediction.
            study.observed(f"unsteadiness_{name}", float(np.log(ratios).std())),
        ]
    return rows


def _of_approximation(name: str) -> list[study.Claim]:
    title = f"{name} Fisher matrix" if name in KINDS else f"{name} structure"
    source = f"{PAPER}, for approximations (beyond the paper)"
    return [
        claim(f"predicts-{name}", source, study.Equivalence(f"late_ratio_{name}", 1.0, CLOSE),
              f"At the edge the largest eigenvalue of the {title} is the Hessian's, within a tenth.",
              "Its ratio to the Hessian's, the mean over the later half of the checkpoints.",
              EXPECTED.get(name, study.undecided("No theorem covers it."))),
        claim(f"tracks-{name}", source, study.Inequality(f"unsteadiness_{name}", "less", CLOSE),
              f"Up to a constant factor the largest eigenvalue of the {title} follows the Hessian's.",
              "Standard deviation over the run of the log of their ratio.",
              study.undecided("Its scale may change as layers come to matter differently.")),
    ]  # fmt: skip


STRUCTURES: study.Experiment[Config] = study.Experiment(
    name="structures",
    cells=lambda config: points(config, [{"eta": config.middle}]),
    measure=_measure,
    claims=lambda config: [one for name in (*config.structures, *KINDS) for one in _of_approximation(name)],
    seconds=8.0,
    memory=memory,
)
