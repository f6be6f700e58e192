"""The complexity term of the generalisation bound, for true and for random labels (claim 12, a measured quantity)."""

from dataclasses import replace
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from analyses.claims import claim
from analyses.descent import outputs
from analyses.jacobian_rank.config import Config
from analyses.jacobian_rank.descent import descend
from analyses.jacobian_rank.points import PAPER, experiment, page, second_largest, seconds
from analyses.jacobian_rank.setting import Setting
from curvlab import study, theory
from curvlab.fisher import Full

TRUE, RANDOM = "true", "random"
ETA, STEPS = 0.5, 10


def _points(config: Config) -> list[study.Point]:
    at = {"width": second_largest(config), "activation": config.activation[0]}
    return [{**at, "labels": labels} for labels in (TRUE, RANDOM)]


def _labelled(setting: Setting, cell: study.Cell) -> Setting:
    """Return the setting with its labels, or with the same ones in random order."""
    if cell["labels"] == TRUE:
        return setting
    generator = torch.Generator().manual_seed(int(cell["seed"]))
    x, y = setting.problem.train
    return Setting(replace(setting.problem, train=(x, y[torch.randperm(len(y), generator=generator)])))


def _measure(cell: study.Cell, context: study.Context[Config]) -> study.Observations:
    setting = _labelled(Setting.of(cell, context.config), cell)
    if not setting.full_rank:
        return []
    term = theory.complexity_term(setting.targets.numpy(force=True), setting.gram.numpy(force=True))
    model = setting.network()
    descend(setting, setting.natural(Full()), ETA, STEPS, model)
    residual = outputs(model, setting.inputs) - setting.targets
    return [
        study.observed("complexity", term),
        study.observed("test_error", _test_error(model, *setting.problem.test)),
        study.observed("train_residual", float(residual.norm())),
    ]


def _test_error(model: nn.Module, x: Tensor, y: Float[Tensor, "N C"]) -> float:
    """Share of samples of which one output has the wrong sign, or of several another one than the target's is largest."""
    with torch.no_grad():
        z = model(x)
    wrong = z.argmax(1) != y.argmax(1) if y.shape[1] > 1 else z[:, 0].sign() != y[:, 0].sign()
    return float(wrong.double().mean())


def _complexity(labels: str, direction: Literal["less", "greater"], reason: str) -> study.Claim:
    return claim(
        f"complexity-{labels}", page(f"{PAPER}, generalisation", "claim 12, recalled"),
        study.Inequality("complexity", direction, 1.0),
        f"The complexity term √(2 yᵀG⁻¹y/n) of {labels} labels is {'below' if direction == 'less' else 'above'} 1.",
        "The term with G(0), targets ±½.",
        study.undecided(reason), at={"labels": labels},
    )  # fmt: skip


CLAIMS = [
    _complexity(TRUE, "less", "Targets in the leading modes of the kernel cost little."),
    _complexity(RANDOM, "greater", "Targets without structure lie in all modes, the least included."),
]

GENERALISATION = experiment(_points, name="generalisation", measure=_measure, claims=CLAIMS, seconds=seconds(0.1, 0.3))
