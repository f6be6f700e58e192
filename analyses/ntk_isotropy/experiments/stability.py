"""The edge of stability of preconditioned training, at its root: λ_max(F⁻¹F) and λ_max(F⁻¹H) against 2/η (claim 15)."""

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
from analyses.ntk_isotropy.points import experiment, page, seconds
from analyses.ntk_isotropy.setting import Setting, make
from curvlab import study, theory
from curvlab.rows.layer import LayerRows
from curvlab.rows.parameters import ParameterSpace
from curvlab.rows.rows import gram
from curvlab.spectrum import Hessian

STRUCTURES = ("full", "block-diagonal")
NEAR = 1e-5
"""The test starts once exact natural gradient at η = 1 has shrunk the residual by this: the theorem is about interpolation."""
WARM_UP = 12
"""Steps after which that is given up."""
STEPS = 6
FACTORS = (0.9, 1.1)
"""Step sizes tested, in units of 2/λ_max."""


def _points(config: Config) -> list[study.Point]:
    at = {"width": config.swept_widths[0], "activation": "erf"}
    structures = [name for name in STRUCTURES if name in config.structures]
    return [{**at, "structure": name, "factor": factor} for name in structures for factor in FACTORS]


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
    name, factor = str(cell["structure"]), float(cell["factor"])
    alpha = setting.alpha(name)
    assert alpha is not None
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
    hessian_top = _hessian_top(setting, model, name)
    eta = factor * theory.stability_limit(hessian_top)
    before = outputs(model, setting.inputs).numpy(force=True)
    trained, _, ended = train(model, setting, eta, STEPS, frozen(structure, setting))
    residuals = [float(np.linalg.norm(f - y)) for f in (before, *trained)]
    growth = (residuals[-1] / residuals[0]) ** (1 / STEPS)
    return [
        study.observed("fisher_top_over_alpha", fisher_top / alpha),
        study.observed("hessian_top_over_alpha", hessian_top / alpha),
        study.observed("growth", growth, predicted=abs(1 - 2 * factor), **ended),
        *(study.observed("residual", r, step=t, **ended) for t, r in enumerate(residuals)),
    ]


def _sharpness(structure: str) -> study.Claim:
    return claim(
        f"preconditioned-sharpness-{structure}", page("derived", "claim 15"),
        study.Equivalence("hessian_top_over_alpha", 1.0, 0.02),
        f"Near interpolation λ_max(F⁻¹H) of the {structure} Fisher is α.",
        f"λ_max(F⁻¹H)/α on range(F), once exact natural gradient has shrunk the residual to {NEAR:g}.",
        study.supported("H is the Gauss-Newton matrix up to the residual times the curvature of f."),
        at={"structure": structure},
    )  # fmt: skip


def _edge(structure: str, factor: float) -> study.Claim:
    below = factor < 1
    return claim(
        f"edge-{structure}-{'below' if below else 'above'}", page("derived", "claim 15"),
        study.Inequality("growth", "less" if below else "greater", 1.0),
        f"At η = {factor:g} · 2/λ_max(F⁻¹H) the residual {'shrinks' if below else 'grows'}.",
        f"Geometric mean growth of the training residual over {STEPS} steps.",
        study.supported(f"The predicted factor per step is {abs(1 - 2 * factor):g}."),
        at={"structure": structure, "factor": factor},
    )  # fmt: skip


CLAIMS = [claim for name in STRUCTURES for claim in (_sharpness(name), *(_edge(name, factor) for factor in FACTORS))]


STABILITY = experiment(_points, name="stability", measure=_measure, claims=CLAIMS, seconds=seconds(0.5, 10.0))
