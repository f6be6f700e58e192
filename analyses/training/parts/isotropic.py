"""The theory's rate through the optimiser: at η = 1/α all isotropic structures train alike in the wide limit.

Undamped `NaturalGradient` on the whole training set of a wide NTK-parameterised MLP. In the limit one step at η = 1/α leaves
nothing of the residual and one at η = 1/(2α) half of it, whatever the structure; what is left at a finite width is its
distance from the limit.
"""

from __future__ import annotations

import copy

import pandas as pd
import torch
from torch import nn

from analyses.estimates import by_seed
from analyses.ntk_isotropy.setting import Setting
from analyses.part import Observations, where
from analyses.training.config import Config
from analyses.training.part import Part, cells_of
from curvlab.optim import NaturalGradient
from curvlab.problems import resolve
from curvlab.study import Cell, Claim, Equivalence, Inequality

NAME = "isotropic"
PAPER = "Karakida & Osawa 2020"
STRUCTURES = ("full", "block-diagonal", "block-tridiagonal", "kfac", "unit-wise")
WIDTH = 1024
SAMPLES = 20
SCALES = (1.0, 0.5)
"""η in units of 1/α."""
LEFT = 0.1
"""Share of the residual that a step at η = 1/α may leave to count as a step to the solution."""
MARGIN = 0.05


def _cells(config: Config) -> list[Cell]:
    return cells_of(
        NAME, config.seeds, [{"structure": structure} for structure in STRUCTURES if structure in config.structures]
    )


def residual(model: nn.Module, setting: Setting) -> float:
    """‖f − y‖ on the training set."""
    with torch.no_grad():
        return float((model(setting.inputs) - setting.targets).norm())


def _measure(cell: Cell, config: Config) -> Observations:
    problem = resolve("digits", width=WIDTH, samples=SAMPLES, seed=int(cell["seed"])).to(config.device)
    setting = Setting(problem, "relu")
    alpha = setting.alpha(str(cell["structure"]))
    assert alpha is not None
    rows: list[dict[str, object]] = [{"quantity": "alpha", "value": alpha}]
    for scale in SCALES:
        model = copy.deepcopy(problem.model)
        optimiser = NaturalGradient(
            model, problem.loss, scale / alpha, structure=str(cell["structure"]), kind="exact", damping=0.0, decay=0.0
        )
        before = residual(model, setting)
        with optimiser.collect():
            problem.loss(model(setting.inputs), setting.targets).backward()
        optimiser.step()
        rows.append({"quantity": "rate", "value": residual(model, setting) / before, "scale": scale})
    return rows


def _at(scale: float, table: pd.DataFrame) -> pd.DataFrame:
    return table[table["scale"] == scale]


def _claims(config: Config) -> list[Claim]:
    claims = []
    for structure in (name for name in STRUCTURES if name in config.structures):
        loose = structure in ("kfac", "unit-wise")
        claims += [
            Claim(
                id=f"rate-{structure}",
                statement=f"At η = 1/α one step of {structure} natural gradient brings a wide network to its targets.",
                source=f"{PAPER}, section 4 (theory file, claim 7)",
                measured=f"‖f − y‖ after one undamped step over that before, width {WIDTH}, N = {SAMPLES}; 0 in the limit.",
                rule=Inequality(LEFT, "less"),
                estimate=lambda table: by_seed(_at(1.0, table)),
                expected="open" if loose else "supported",
                reason="The response is αI up to the change of J; K-FAC's undamped steps are long, and a unit's rank is that of "
                "its active samples.",
                needs=where(NAME, structure=structure),
                quantities=("rate",),
            ),
            Claim(
                id=f"equal-rate-{structure}",
                statement=f"At η = 1/(2α) one step of {structure} natural gradient leaves half of the residual, as with every "
                "isotropic structure.",
                source=f"{PAPER}, section 4 (theory file, claim 7)",
                measured="The same ratio at half the step.",
                rule=Equivalence(0.5, MARGIN),
                estimate=lambda table: by_seed(_at(0.5, table)),
                expected="open" if loose else "supported",
                reason="(1 − αη) = 1/2 in the limit, and a shorter step is nearer to it.",
                needs=where(NAME, structure=structure),
                quantities=("rate",),
            ),
        ]
    return claims


PART = Part(NAME, _cells, _measure, _claims, seconds=lambda _: 1.0)
