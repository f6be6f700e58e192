"""The largest eigenvalue of every approximation along gradient descent: how well it predicts the Hessian's."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import nn

from analyses.edge_of_stability.config import Config
from analyses.edge_of_stability.descent import descend
from analyses.edge_of_stability.optimisers import momentum
from analyses.edge_of_stability.part import PAPER, Part, cells_of
from analyses.edge_of_stability.setting import Setting, setting_of
from analyses.estimates import by_seed
from analyses.part import Expectation, Observations, where
from curvlab.fisher import make
from curvlab.rows import sqrt_fisher
from curvlab.rows.loss import Kind
from curvlab.spectrum import Eigenpairs, Operator, RowsOperator, StructureOperator, eigenpairs
from curvlab.study import Cell, Claim, Equivalence, Inequality

NAME = "structures"
CHECKPOINTS = 10
TOLERANCE = 1e-2
"""Of the residuals; the eigenvalues' error is about its square over their distance, relative to the largest."""
KINDS: tuple[Kind, ...] = ("mc", "empirical")
"""Fisher matrices besides the exact one, which is the full structure."""
EXPECTED: dict[str, tuple[Expectation, str]] = {
    "full": ("supported", "The residual part of the Hessian is small where the loss is."),
    "block-diagonal": (
        "open",
        "Its largest eigenvalue is at most the full one, and at least that over the number of layers.",
    ),
}
CLOSE = 0.1
"""Relative distance from the Hessian's largest eigenvalue that counts as predicting it."""


def _cells(config: Config) -> list[Cell]:
    return cells_of(NAME, config, [{"eta": config.middle}])


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


def _measure(cell: Cell, config: Config) -> Observations:
    setting, seed = setting_of(cell, config), int(cell["seed"])
    model = setting.network()
    shown = np.unique(np.linspace(0, config.steps, CHECKPOINTS).round().astype(int)).tolist()
    last: dict[str, Eigenpairs] = {}
    rows: list[dict[str, object]] = []
    ratios: dict[str, list[float]] = {}

    def observe(step: int, now: nn.Module) -> None:
        if step not in shown:
            return
        for name, operator in _operators(setting, now, config, seed):
            last[name] = eigenpairs(operator, 1, start=last.get(name), tolerance=TOLERANCE, block=4)
            largest, reference = float(last[name].values[0]), float(last["hessian"].values[0])
            rows.append({"quantity": "largest", "value": largest, "approximation": name, "step": step})
            ratios.setdefault(name, []).append(largest / reference)

    run = descend(model, setting, momentum(model, "gd", float(cell["eta"]), 0.0), config.steps, (), observe=observe)
    if run.diverged is not None:
        rows.append(
            {"quantity": "diverged", "value": float(run.diverged), "status": f"diverged at step {run.diverged}"}
        )
    for name, series in ratios.items():
        late = np.array(series[len(series) // 2 :])
        rows.append({"quantity": f"late_ratio_{name}", "value": float(late.mean())})
        # The spread of log ratios says whether a constant factor would mend the prediction.
        rows.append({"quantity": f"unsteadiness_{name}", "value": float(np.log(series).std())})
    return rows


def _claims(config: Config) -> list[Claim]:
    claims = []
    for name in (*config.structures, *KINDS):
        title = f"{name} Fisher matrix" if name in KINDS else f"{name} structure"
        expected, reason = EXPECTED.get(name, ("open", "No theorem covers it."))
        claims += [
            Claim(
                id=f"predicts-{name}",
                statement=f"At the edge the largest eigenvalue of the {title} is the Hessian's, within a tenth.",
                source=f"{PAPER}, for approximations (beyond the paper)",
                measured="Its ratio to the Hessian's, the mean over the later half of the checkpoints.",
                rule=Equivalence(1.0, CLOSE),
                estimate=by_seed,
                expected=expected,
                reason=reason,
                needs=where(NAME),
                quantities=(f"late_ratio_{name}",),
            ),
            Claim(
                id=f"tracks-{name}",
                statement=f"Up to a constant factor the largest eigenvalue of the {title} follows the Hessian's.",
                source=f"{PAPER}, for approximations (beyond the paper)",
                measured="Standard deviation over the run of the log of their ratio.",
                rule=Inequality(CLOSE, "less"),
                estimate=by_seed,
                expected="open",
                reason="Its scale may change as layers come to matter differently.",
                needs=where(NAME),
                quantities=(f"unsteadiness_{name}",),
            ),
        ]
    return claims


PART = Part(NAME, _cells, _measure, _claims, seconds=lambda _: 8.0)
