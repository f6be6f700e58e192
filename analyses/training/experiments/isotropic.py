"""The theory's rate through the optimiser: at η = 1/α all isotropic structures train alike in the wide limit.

Undamped `NaturalGradient` on the whole training set of a wide NTK-parameterised MLP. In the limit one step at η = 1/α leaves
nothing of the residual and one at η = 1/(2α) half of it, whatever the structure; what is left at a finite width is its
distance from the limit.
"""

import copy
from collections.abc import Callable, Mapping
from dataclasses import replace

from analyses.claims import claim
from analyses.ntk_isotropy.setting import Setting
from analyses.training.config import Config
from analyses.training.run import FullBatch
from curvlab import study
from curvlab.optim import NaturalGradient
from curvlab.problems import resolve

PAPER = "Karakida & Osawa 2020"
EXPECTED: Mapping[str, Callable[[str], study.Expected]] = {
    "full": study.supported,
    "block-diagonal": study.supported,
    "block-tridiagonal": study.supported,
    "kfac": study.undecided,
    "unit-wise": study.undecided,
}
"""Isotropic structures, and what is expected of their rates."""
WIDTH = 1024
SAMPLES = 20
SCALES = (1.0, 0.5)
"""η in units of 1/α."""
LEFT = 0.1
"""Share of the residual that a step at η = 1/α may leave to count as a step to the solution."""
MARGIN = 0.05


def _measure(cell: study.Cell, context: study.Context[Config]) -> study.Observations:
    structure = str(cell["structure"])
    start = resolve("digits", width=WIDTH, samples=SAMPLES, seed=int(cell["seed"])).to(context.config.device)
    alpha = Setting(start).alpha(structure)
    assert alpha is not None
    rows = [study.observed("alpha", alpha)]
    for scale in SCALES:
        problem = replace(start, model=copy.deepcopy(start.model))
        optimiser = NaturalGradient(
            problem.model, problem.loss, scale / alpha, structure=structure, kind="exact", damping=0.0, decay=0.0
        )
        before, after = study.follow(FullBatch(problem, [optimiser]), 1).series("squared")
        rows.append(study.observed("rate", (after / before) ** 0.5, scale=scale))
    return rows


def _reaches(structure: str) -> study.Claim:
    return claim(
        f"rate-{structure}", f"{PAPER}, section 4 (docs/theory/karakida_osawa_2020.md, claim 7)",
        study.Inequality("rate", "less", LEFT),
        f"At η = 1/α one step of {structure} natural gradient brings a wide network to its targets.",
        f"‖f − y‖ after one undamped step over that before, width {WIDTH}, N = {SAMPLES}; 0 in the limit.",
        EXPECTED[structure]("The response is αI up to the change of J; K-FAC's undamped steps are long, and a unit's rank "
                            "is that of its active samples."),
        at={"structure": structure}, estimate=study.among(study.by_seed, scale=1.0),
    )  # fmt: skip


def _halves(structure: str) -> study.Claim:
    return claim(
        f"equal-rate-{structure}", f"{PAPER}, section 4 (docs/theory/karakida_osawa_2020.md, claim 7)",
        study.Equivalence("rate", 0.5, MARGIN),
        f"At η = 1/(2α) one step of {structure} natural gradient leaves half of the residual, as with every isotropic "
        "structure.",
        "The same ratio at half the step.",
        EXPECTED[structure]("(1 − αη) = 1/2 in the limit, and a shorter step is nearer to it."), at={"structure": structure},
        estimate=study.among(study.by_seed, scale=0.5),
    )  # fmt: skip


CLAIMS = [claim(structure) for structure in EXPECTED for claim in (_reaches, _halves)]


ISOTROPIC: study.Experiment[Config] = study.Experiment(
    name="isotropic",
    cells=lambda config: [{"structure": structure} for structure in EXPECTED if structure in config.structures],
    measure=_measure,
    claims=CLAIMS,
    seconds=1.0,
    memory=8e8,
)
