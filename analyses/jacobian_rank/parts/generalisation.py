"""The complexity term of the generalisation bound, for true and for random labels (claim 12, a measured quantity)."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from analyses.estimates import by_seed
from analyses.jacobian_rank.config import Config
from analyses.jacobian_rank.descent import descend, natural
from analyses.jacobian_rank.part import PAPER, Part, cells_of
from analyses.jacobian_rank.setting import Setting, outputs, setting_of
from analyses.part import Observations, where
from curvlab import theory
from curvlab.fisher import Full
from curvlab.study import Cell, Claim, Inequality

NAME = "generalisation"
TRUE, RANDOM = "true", "random"
ETA, STEPS = 0.5, 10


def _cells(config: Config) -> list[Cell]:
    at = {"width": config.swept_widths[-2:][0], "activation": config.activation[0]}
    return cells_of(NAME, config, [{**at, "labels": labels} for labels in (TRUE, RANDOM)])


def _labelled(setting: Setting, cell: Cell) -> Setting:
    """Return the setting with its labels, or with the same ones in random order."""
    if cell["labels"] == TRUE:
        return setting
    generator = torch.Generator().manual_seed(int(cell["seed"]))
    x, y = setting.problem.train
    return Setting(replace(setting.problem, train=(x, y[torch.randperm(len(y), generator=generator)])))


def _measure(cell: Cell, config: Config) -> Observations:
    setting = _labelled(setting_of(cell, config), cell)
    if not setting.full_rank:
        return []
    term = theory.complexity_term(setting.targets.numpy(force=True), setting.gram.numpy(force=True))
    model = copy.deepcopy(setting.problem.model)
    descend(model, setting, natural(Full(), setting), ETA, STEPS)
    return [
        {"quantity": "complexity", "value": term},
        {"quantity": "test_error", "value": _test_error(model, *setting.problem.test)},
        {
            "quantity": "train_residual",
            "value": float(np.linalg.norm(outputs(model, setting.inputs) - setting.targets)),
        },
    ]


def _test_error(model: nn.Module, x: Tensor, y: Float[Tensor, "N C"]) -> float:
    """Share of samples of which one output has the wrong sign, or of several another one than the target's is largest."""
    with torch.no_grad():
        z = model(x)
    wrong = z.argmax(1) != y.argmax(1) if y.shape[1] > 1 else z[:, 0].sign() != y[:, 0].sign()
    return float(wrong.double().mean())


def _claims(config: Config) -> list[Claim]:  # noqa: ARG001
    def claim(labels: str, where_: str, rule: Inequality, reason: str) -> Claim:
        return Claim(
            id=f"complexity-{labels}",
            statement=f"The complexity term √(2 yᵀG⁻¹y/n) of {labels} labels is {where_} 1.",
            source=f"{PAPER}, generalisation (theory file, claim 12, recalled)",
            measured="The term with G(0), targets ±½.",
            rule=rule,
            estimate=by_seed,
            expected="open",
            reason=reason,
            needs=where(NAME, labels=labels),
            quantities=("complexity",),
        )

    return [
        claim(TRUE, "below", Inequality(1.0, "less"), "Targets in the leading modes of the kernel cost little."),
        claim(
            RANDOM,
            "above",
            Inequality(1.0, "greater"),
            "Targets without structure lie in all modes, the least included.",
        ),
    ]


PART = Part(NAME, _cells, _measure, _claims, seconds=lambda width: 0.1 + 0.3 * width / 16384)
