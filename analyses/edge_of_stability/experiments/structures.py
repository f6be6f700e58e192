"""The largest eigenvalue of every approximation along gradient descent: how well it predicts the Hessian's."""

from collections.abc import Collection, Iterator

import numpy as np
from jaxtyping import Float
from torch import nn

from analyses.claims import claim
from analyses.edge_of_stability.config import Config
from analyses.edge_of_stability.descent import descend, gradient_descent
from analyses.edge_of_stability.points import PAPER, memory, page, points
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
HESSIAN, BLOCKS = "Hessian", "block-diagonal"
PREDICTED = {
    **dict.fromkeys(("full", "block-tridiagonal", *KINDS), HESSIAN),
    **dict.fromkeys(("kfac", "ekfac"), BLOCKS),
}
"""Whose largest eigenvalue an approximation's is to be. K-FAC approximates the blocks of layers; and that of a part of the
full matrix, as the others are, is at most the full one's, so that nothing is claimed."""
CLOSE = 0.1
"""Relative distance from a largest eigenvalue that counts as predicting it."""


def _operators(setting: Setting, model: nn.Module, config: Config, seed: int) -> Iterator[tuple[str, Operator]]:
    """Yield what stands for the Hessian, by name."""
    loss, (inputs, targets) = setting.problem.loss, setting.problem.train
    yield HESSIAN, setting.hessian(model)
    rows = sqrt_fisher(model, loss, inputs, targets)
    for structure in config.structures:
        yield structure, StructureOperator(make(structure).update(rows))
    for kind in KINDS:
        generator = study.generator(seed, "labels", device=inputs.device) if kind == "mc" else None
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

    def logs(name: str, other: str) -> Float[np.ndarray, " checkpoints"]:
        return np.log([seen["largest"][name] / seen["largest"][other] for seen in measured])

    for name in last:
        # The spread of log ratios says whether a constant factor would mend a prediction.
        rows.append(study.observed(f"unsteadiness_{name}", float(logs(name, HESSIAN).std())))
        if (other := PREDICTED.get(name)) in last:
            late = logs(name, other)[len(measured) // 2 :]
            rows.append(study.observed(f"late_ratio_{name}", float(np.exp(late.mean()))))
    return rows


def _of_approximation(name: str, known: Collection[str]) -> list[study.Claim]:
    """Claims on one approximation, where the largest eigenvalues of others are known."""
    title = f"{name} Fisher matrix" if name in KINDS else f"{name} structure"
    beyond = f"{PAPER}, for approximations (beyond the paper)"
    full = name == "full"
    tracks = claim(
        f"tracks-{name}", beyond, study.Inequality(f"unsteadiness_{name}", "less", CLOSE, centre="geometric mean"),
        f"Up to a constant factor the largest eigenvalue of the {title} follows the Hessian's.",
        "Standard deviation over the run of the log of their ratio.",
        study.undecided("Its scale may change as layers come to matter differently."), group="exploration",
    )  # fmt: skip
    if (other := PREDICTED.get(name)) not in known:
        return [tracks]
    predicts = claim(
        f"predicts-{name}", page("claim 13") if full else beyond,
        study.Equivalence(f"late_ratio_{name}", 1.0, CLOSE, centre="geometric mean"),
        f"At the edge the largest eigenvalue of the {title} is that of the {other} matrix, within a tenth.",
        "Its ratio to that, the geometric mean over the later half of the checkpoints.",
        study.supported("The residual part of the Hessian is small where the loss is.") if full
        else study.undecided("No theorem covers it."), group="derived" if full else "exploration",
    )  # fmt: skip
    return [predicts, tracks]


def _claims(config: Config) -> list[study.Claim]:
    known = (HESSIAN, *config.structures)
    return [one for name in (*config.structures, *KINDS) for one in _of_approximation(name, known)]


STRUCTURES: study.Experiment[Config] = study.Experiment(
    name="structures",
    cells=lambda config: points(config, [{"eta": config.middle}]),
    measure=_measure,
    varies=("initialisation", "draws"),
    claims=_claims,
    seconds=8.0,
    memory=memory,
)
