"""Contraction and stability near interpolation, where they are exact (claim 7), and λ_max(F⁻¹H), on which they rest (claim 15).

A first step from the initialisation at αη ≈ 2 is bent back by the curvature of f and says nothing of stability.
"""

import copy
from functools import partial

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

import curvlab
from analyses.claims import claim
from analyses.descent import Descent, outputs
from analyses.ntk_isotropy.config import Config
from analyses.ntk_isotropy.descent import both_outputs, frozen, train
from analyses.ntk_isotropy.points import PAPER, experiment, page, seconds
from analyses.ntk_isotropy.setting import PUBLISHED, Setting, make
from curvlab import study
from curvlab.rows.layer import LayerRows
from curvlab.rows.parameters import ParameterSpace
from curvlab.rows.rows import gram
from curvlab.spectrum import Hessian

SHARPNESS = ("full", "block-diagonal")
"""Structures of which λ_max(F⁻¹H) is computed."""
NEAR = 1e-5
"""The test starts once exact natural gradient at η = 1 has shrunk the residual by this: the theorem is about interpolation."""
WARM_UP = 12
"""Steps after which that is given up."""
STEPS = 6
RATES = (0.5, 1.5, 1.8, 2.2)
"""Step sizes tested, in units of 1/α."""


def _points(config: Config) -> list[study.Point]:
    at = {"width": config.swept_widths[0], "activation": "erf"}
    return [{**at, "structure": name} for name in PUBLISHED if name in config.structures]


def _normalised_range(layers: list[LayerRows], space: ParameterSpace) -> Float[Tensor, "K P"]:
    """Return vectors W that span the range of a block, with `Wᵀ F W = I`."""
    system = gram(layers, layers)
    values, vectors = torch.linalg.eigh(system)
    kept = values > len(values) * torch.finfo(values.dtype).eps * values[-1]
    coefficients = (vectors[:, kept] / values[kept]).T
    named = {name: coefficients.new_zeros(len(coefficients), *shape) for name, shape in space.shapes.items()}
    for layer in layers:
        named |= layer.layout.split(layer.rmatvec(coefficients))
    return space.flatten(named)


def _hessian_top(setting: Setting, model: nn.Module, structure: str) -> float:
    """λ_max of F⁻¹H on range(F), by Hessian-vector products with a basis of the range in which F is the identity."""
    rows = curvlab.sqrt_fisher(model, setting.problem.loss, *setting.problem.train)
    groups = [list(rows.layers)] if structure == "full" else [[layer] for layer in rows.layers]
    basis = torch.cat([_normalised_range(group, rows.space) for group in groups])
    matrix = basis @ Hessian(model, setting.problem.loss, setting.problem.train).matmat(basis).T
    return float(torch.linalg.eigvalsh((matrix + matrix.T) / 2)[-1])


def _measure(cell: study.Cell, context: study.Context[Config]) -> study.Observations:
    setting = Setting.of(cell, context.config)
    name = str(cell["structure"])
    alpha = setting.alpha(name)
    if alpha is None:
        return []
    y = setting.targets.numpy(force=True)
    model = setting.network()
    start = float(np.linalg.norm(setting.initial.numpy(force=True) - y))
    study.follow(
        Descent(model, setting.natural(make("full")), 1.0, partial(both_outputs, setting=setting)),
        WARM_UP,
        until=lambda seen: bool(np.linalg.norm(seen["train"] - y) < NEAR * start),
    )
    rows = curvlab.sqrt_fisher(model, setting.problem.loss, *setting.problem.train)
    structure = make(name).update(rows)
    response = structure.response(rows.jacobian(), 0.0)
    fisher_top = float(torch.linalg.eigvalsh((response + response.T) / 2)[-1])
    observed = [study.observed("fisher_top_over_alpha", fisher_top / alpha)]
    if name in SHARPNESS:
        observed.append(study.observed("hessian_top_over_alpha", _hessian_top(setting, model, name) / alpha))
    before = outputs(model, setting.inputs).numpy(force=True)
    direction = frozen(structure, setting)
    for rate in RATES:
        trained, _, ended = train(copy.deepcopy(model), setting, rate / alpha, STEPS, direction)
        residuals = [float(np.linalg.norm(f - y)) for f in (before, *trained)]
        law = abs(1 - rate)
        growth = (residuals[-1] / residuals[0]) ** (1 / STEPS)
        observed += [
            study.observed("growth", growth, predicted=law, rate=rate, **ended),
            study.observed("growth_over_law", growth / law, rate=rate, **ended),
            *(study.observed("residual", r, step=t, rate=rate, **ended) for t, r in enumerate(residuals)),
        ]
    return observed


def _sharpness(structure: str) -> study.Claim:
    return claim(
        f"preconditioned-sharpness-{structure}", page("derived", "claim 15"),
        study.Equivalence("hessian_top_over_alpha", 1.0, 0.02, centre="geometric mean"),
        f"Near interpolation λ_max(F⁻¹H) of the {structure} Fisher is α.",
        f"λ_max(F⁻¹H)/α on range(F), once exact natural gradient has shrunk the residual to {NEAR:g}.",
        study.supported("H is the Gauss-Newton matrix up to the residual times the curvature of f."), group="derived",
        at={"structure": structure},
    )  # fmt: skip


def _stability(structure: str, rate: float) -> study.Claim:
    grows = "grows" if rate > 2 else "shrinks"
    return claim(
        f"stability-{structure}-{rate:g}", page(f"{PAPER}, section 4: stable iff η < 2/α", "claim 7"),
        study.Equivalence("growth_over_law", 1.0, 0.02, centre="geometric mean"),
        f"Near interpolation the {structure} training residual {grows} by |1 − αη| a step at αη = {rate:g}.",
        f"Geometric mean growth of the training residual over {STEPS} steps with the structure held, over |1 − αη|.",
        study.supported(f"The law is {abs(1 - rate):g}, and f is linear up to the residual."), group="paper",
        at={"structure": structure}, estimate=study.among(study.by_seed, rate=rate),
    )  # fmt: skip


CLAIMS = [
    *(_sharpness(structure) for structure in SHARPNESS),
    *(_stability(structure, rate) for structure in PUBLISHED for rate in RATES),
]

STABILITY = experiment(_points, name="stability", measure=_measure, claims=CLAIMS, seconds=seconds(0.7, 12.0))
