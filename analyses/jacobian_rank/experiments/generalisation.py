"""The complexity term of the generalisation bound, for true and for random labels (claim 12, a measured quantity)."""

from dataclasses import replace
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor, nn

from analyses.claims import claim
from analyses.descent import outputs
from analyses.jacobian_rank.config import Config
from analyses.jacobian_rank.descent import descend
from analyses.jacobian_rank.points import BOTH, experiment, page, second_largest, seconds
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
    x, y = setting.problem.train
    order = torch.randperm(len(y), generator=study.generator(int(cell["seed"]), "labels"))
    return Setting(replace(setting.problem, train=(x, y[order])))


def _measure(cell: study.Cell, context: study.Context[Config]) -> study.Observations:
    setting = _labelled(Setting.of(cell, context.config), cell)
    if not setting.full_rank:
        return []
    term = theory.complexity_term(setting.targets.numpy(force=True), setting.gram.numpy(force=True))
    model = setting.network()
    descend(setting, setting.natural(Full()), ETA, STEPS, model)
    residual = outputs(model, setting.inputs) - setting.targets
    wrong, distance = _test_errors(model, *setting.problem.test)
    return [
        study.observed("complexity", term),
        study.observed("test_error", wrong),
        study.observed("test_excess", distance - term),
        study.observed("train_residual", float(residual.norm())),
    ]


def _test_errors(model: nn.Module, x: Tensor, y: Float[Tensor, "N C"]) -> tuple[float, float]:
    """Share of samples with an output of the wrong sign, or of several another largest than the target's; mean distance."""
    with torch.no_grad():
        z = model(x)
    wrong = z.argmax(1) != y.argmax(1) if y.shape[1] > 1 else z[:, 0].sign() != y[:, 0].sign()
    return float(wrong.double().mean()), float((z - y).norm(dim=1).mean())


PLACE = page("generalisation", "claim 12, recalled")
CLAIMS = [
    claim("complexity-bound", PLACE, study.Always("test_excess", "less", 0.0),
          "The test error of natural gradient is at most the complexity term √(2 yᵀG⁻¹y/n), for true and for random labels.",
          "Mean of |u − y| over test samples, whose labels are true, less the term with G(0), targets ±½.",
          study.supported("The theorem adds a term of order √(log n/n) on the right, and bounds the mean over all samples."),
          group="paper", bound_from="the theorem"),
    claim("complexity-order", PLACE, study.Wins("complexity", "greater"),
          "Random labels have a larger complexity term than true ones.",
          "The term of the same labels in random order less that in their own, at one initialisation.",
          study.supported("Targets in the leading modes of the kernel cost little; those without structure lie in all modes."),
          group="derived", estimate=partial(study.difference_by_seed, column="labels", first=RANDOM, second=TRUE)),
]  # fmt: skip

GENERALISATION = experiment(
    _points, varies=BOTH, name="generalisation", measure=_measure, claims=CLAIMS, seconds=seconds(0.1, 0.3)
)
