"""The edge of stability of preconditioned training, at its root: λ_max(F⁻¹F) and λ_max(F⁻¹H) against 2/η (claim 15)."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import grad, jvp, vmap

import curvlab
from analyses.estimates import by_seed
from analyses.ntk_isotropy.config import Config
from analyses.ntk_isotropy.part import Part, cells_of
from analyses.ntk_isotropy.parts.steps import frozen, natural, outputs, train
from analyses.ntk_isotropy.setting import Setting, flat, make, setting_of
from analyses.part import Observations, where
from curvlab import theory
from curvlab.nn.functional import called_with
from curvlab.rows.layer import LayerRows
from curvlab.rows.rows import gram
from curvlab.study import Cell, Claim, Equivalence, Inequality

NAME = "stability"
STRUCTURES = ("full", "block-diagonal")
NEAR = 1e-5
"""The test starts once exact natural gradient at η = 1 has shrunk the residual by this: the theorem is about interpolation."""
WARM_UP = 12
"""Steps after which that is given up."""
STEPS = 6
FACTORS = (0.9, 1.1)
"""Step sizes tested, in units of 2/λ_max."""
VECTORS = 20
"""Hessian-vector products that are formed at once."""


def _cells(config: Config) -> list[Cell]:
    smallest = config.swept_widths[0]
    points: list[Mapping[str, object]] = [
        {"structure": structure, "factor": factor, "width": smallest, "activation": "erf"}
        for structure in STRUCTURES
        for factor in FACTORS
        if structure in config.structures
    ]
    return cells_of(NAME, config, points)


def _normalised_range(layers: list[LayerRows], names: list[str]) -> dict[str, Tensor]:
    """Return vectors W that span the range of a block, with `Wᵀ F W = I`."""
    system = gram(layers, layers)
    values, vectors = torch.linalg.eigh(system)
    kept = values > len(values) * torch.finfo(values.dtype).eps * values[-1]
    coefficients = (vectors[:, kept] / values[kept]).T
    named: dict[str, Tensor] = {}
    for layer in layers:
        named.update(layer.layout.split(layer.rmatvec(coefficients)))
    return {name: named[name] for name in names if name in named}


def _hessian_top(setting: Setting, model: nn.Module, structure: str) -> float:
    """λ_max of F⁻¹H on range(F), by Hessian-vector products with a basis of the range in which F is the identity."""
    rows = curvlab.sqrt_fisher(model, setting.problem.loss, setting.inputs, setting.targets)
    names = list(rows.space.shapes)
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    groups = [list(rows.layers)] if structure == "full" else [[layer] for layer in rows.layers]
    bases = [_normalised_range(group, names) for group in groups]
    count = sum(len(next(iter(basis.values()))) for basis in bases)
    stacked = {
        name: torch.zeros(count, *shape, dtype=rows.dtype, device=rows.device)
        for name, shape in rows.space.shapes.items()
    }
    start = 0
    for basis in bases:
        size = len(next(iter(basis.values())))
        for name, vectors in basis.items():
            stacked[name][start : start + size] = vectors
        start += size

    def loss(values: Mapping[str, Tensor]) -> Tensor:
        result: Tensor = setting.problem.loss(called_with(model, values, (setting.inputs,)), setting.targets)
        return result

    def hessian_vector(vector: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        product: Mapping[str, Tensor] = jvp(grad(loss), (parameters,), (vector,))[1]
        return product

    products = vmap(hessian_vector, chunk_size=VECTORS)(stacked)
    flat_basis, flat_products = rows.space.flatten(stacked), rows.space.flatten(products)
    matrix = flat_basis @ flat_products.T
    return float(torch.linalg.eigvalsh((matrix + matrix.T) / 2)[-1])


def _measure(cell: Cell, config: Config) -> Observations:
    setting = setting_of(cell, config)
    name, factor = str(cell["structure"]), float(cell["factor"])
    alpha = setting.alpha(name)
    assert alpha is not None
    y = flat(setting.targets)
    model = copy.deepcopy(setting.problem.model)
    exact = natural(make("full", setting.depth), setting)
    for _ in range(WARM_UP):
        if (outputs(model, setting.inputs) - y).norm() < NEAR * (setting.initial - y).norm():
            break
        train(model, setting, 1.0, 1, exact)
    rows_now = curvlab.sqrt_fisher(model, setting.problem.loss, setting.inputs, setting.targets)
    structure = make(name, setting.depth).update(rows_now)
    response = structure.response(rows_now.jacobian(), 0.0)
    fisher_top = float(torch.linalg.eigvalsh((response + response.T) / 2)[-1])
    hessian_top = _hessian_top(setting, model, name)
    before = float((outputs(model, setting.inputs) - y).norm())
    eta = factor * theory.stability_limit(hessian_top)
    trained, _ = train(model, setting, eta, STEPS, frozen(structure))
    residuals = [before, *(float(np.linalg.norm(f - y.numpy(force=True))) for f in trained)]
    growth = (residuals[-1] / residuals[0]) ** (1 / STEPS)
    return [
        {"quantity": "fisher_top_over_alpha", "value": fisher_top / alpha},
        {"quantity": "hessian_top_over_alpha", "value": hessian_top / alpha},
        {"quantity": "growth", "value": growth, "predicted": abs(1 - 2 * factor)},
        *({"quantity": "residual", "value": r, "step": t} for t, r in enumerate(residuals)),
    ]


def _claims(config: Config) -> list[Claim]:
    claims: list[Claim] = []
    for structure in STRUCTURES:
        if structure not in config.structures:
            continue
        claims += [
            Claim(
                id=f"preconditioned-sharpness-{structure}",
                statement=f"Near interpolation λ_max(F⁻¹H) of the {structure} Fisher is α.",
                source="derived (theory file, claim 15)",
                measured=f"λ_max(F⁻¹H)/α on range(F), once exact natural gradient has shrunk the residual to {NEAR:g}.",
                rule=Equivalence(1.0, 0.02),
                estimate=by_seed,
                expected="supported",
                reason="H is the Gauss-Newton matrix up to the residual times the curvature of f.",
                needs=where(NAME, structure=structure),
                quantities=("hessian_top_over_alpha",),
            ),
            *(
                Claim(
                    id=f"edge-{structure}-{'below' if factor < 1 else 'above'}",
                    statement=f"At η = {factor:g} · 2/λ_max(F⁻¹H) the residual {'shrinks' if factor < 1 else 'grows'}.",
                    source="derived (theory file, claim 15)",
                    measured=f"Geometric mean growth of the training residual over {STEPS} steps.",
                    rule=Inequality(1.0, "less" if factor < 1 else "greater"),
                    estimate=by_seed,
                    expected="supported",
                    reason=f"The predicted factor per step is {abs(1 - 2 * factor):g}.",
                    needs=where(NAME, structure=structure, factor=factor),
                    quantities=("growth",),
                )
                for factor in FACTORS
            ),
        ]
    return claims


PART = Part(NAME, _cells, _measure, _claims, seconds=lambda width: 0.5 + 10 * (width / 2048) ** 2)
