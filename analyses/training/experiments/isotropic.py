"""One undamped step of the optimiser on a wide network, against the same step computed apart.

At η = 1/α, α that of the structure's response, a step leaves nothing of the residual in the limit of infinite width, and at
η = 1/(2α) half of it. What is left at a finite width is judged in `analyses.ntk_isotropy`; here the optimiser, whose rows
come from the passes of the training itself, has to leave the same as `natural_gradient_step`, which makes its own.
"""

import copy
from collections.abc import Callable
from dataclasses import replace

from torch import nn

from analyses.claims import claim
from analyses.descent import move
from analyses.training.config import Config
from analyses.training.run import FullBatch
from curvlab import study, theory
from curvlab.fisher import make, natural_gradient_step
from curvlab.optim import NaturalGradient
from curvlab.problems import resolve

STRUCTURES = ("full", "block-diagonal", "block-tridiagonal", "kfac", "unit-wise")
"""Those whose α is derived."""
WIDTH = 1024
SAMPLES = 20
SCALES = (1.0, 0.5)
"""η in units of 1/α."""


def _measure(cell: study.Cell, context: study.Context[Config]) -> study.Observations:
    name = str(cell["structure"])
    start = resolve("digits", width=WIDTH, samples=SAMPLES, seed=int(cell["seed"])).to(context.config.device)
    inputs, targets = start.train
    sizes = (inputs.shape[1], WIDTH, WIDTH, targets.shape[1])
    alpha = theory.alpha(name, sizes, SAMPLES, active=0.5)
    structure = make(name)

    def through_optimiser(model: nn.Module, eta: float) -> None:
        optimiser = NaturalGradient(
            model, start.loss, eta, structure=name, kind="exact", damping=0.0, decay=0.0, kl_clip=None
        )
        FullBatch(replace(start, model=model), [optimiser]).step(0)

    def apart(model: nn.Module, eta: float) -> None:
        move(model, natural_gradient_step(structure, model, start.loss, inputs, targets), eta)

    def left(take: Callable[[nn.Module, float], None], eta: float) -> float:
        model = copy.deepcopy(start.model)
        take(model, eta)
        after, before = (FullBatch(replace(start, model=one), []).look(0)["squared"] for one in (model, start.model))
        return float((after / before) ** 0.5)

    rows = []
    for scale in SCALES:
        rate = left(through_optimiser, scale / alpha)
        rows.append(study.observed("rate", rate, scale=scale))
        error = rate / left(apart, scale / alpha) - 1
        tolerance = study.round_off(structure.rows.R, structure.condition_number(), inputs.dtype)
        rows.append(study.observed("rate_error", error, scale=scale, tolerance=tolerance))
    return rows


CLAIMS = [
    claim(
        f"rate-{name}", "self-check; the rates are those of docs/theory/karakida_osawa_2020.md, claim 7",
        study.Identity("rate_error"),
        f"A step of the {name} optimiser leaves the residual that the same step leaves when it is computed apart.",
        f"‖f − y‖ after one undamped step at η = 1/α and 1/(2α), over that by natural_gradient_step, less 1; width {WIDTH}, "
        f"N = {SAMPLES}.",
        study.supported("Both are (F̂ + ρI)⁻¹∇L at ρ = 0."), group="self-check", at={"structure": name},
    )
    for name in STRUCTURES
]  # fmt: skip

ISOTROPIC: study.Experiment[Config] = study.Experiment(
    name="isotropic",
    cells=lambda config: [{"structure": name} for name in STRUCTURES if name in config.structures],
    measure=_measure,
    varies=("initialisation",),
    claims=CLAIMS,
    seconds=1.0,
    memory=8e8,
)
