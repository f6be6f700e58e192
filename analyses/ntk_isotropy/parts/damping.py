"""Damping: one step of exact natural gradient, and the damped block-diagonal response (claim 10)."""

from __future__ import annotations

import copy

import numpy as np
import torch

from analyses.estimates import by_seed, identities
from analyses.ntk_isotropy.config import Config
from analyses.ntk_isotropy.part import PAPER, Part, cells_of
from analyses.ntk_isotropy.parts.steps import move, outputs
from analyses.ntk_isotropy.setting import flat, setting_of
from analyses.part import TOLERANCE_FACTOR, Observations, where
from curvlab import theory
from curvlab.fisher import BlockDiagonal, Full
from curvlab.nn import linearize
from curvlab.study import Cell, Claim, Equivalence, Identity

NAME = "damping"
RELATIVE_DAMPINGS = (1e-6, 1e-4, 1e-2, 1e-1, 1.0, 1e2)
"""ρ in units of λ_max(Θ)."""


def _cells(config: Config) -> list[Cell]:
    return cells_of(NAME, config, [{}])


def _measure(cell: Cell, config: Config) -> Observations:
    setting = setting_of(cell, config)
    kernels = setting.kernels
    kernel = kernels.sum(0)
    values, _ = theory.kernel_modes(kernel)
    residual = setting.initial - flat(setting.targets)
    full, blocks = Full().update(setting.rows), BlockDiagonal().update(setting.rows)
    coefficients = full.rows.dual(residual / setting.samples)
    start = float(residual.square().sum())
    layer_tops = np.linalg.eigvalsh(kernels)[:, -1]
    epsilon = torch.finfo(residual.dtype).eps
    rows: list[dict[str, object]] = []
    for relative in RELATIVE_DAMPINGS:
        rho = relative * float(values[0])
        ratio = theory.damped_loss_ratio(kernel, residual.numpy(force=True), rho)
        condition = float(values[0] + rho) / rho
        tolerance = TOLERANCE_FACTOR * setting.jacobian.R * epsilon * condition
        at = {"rho_relative": relative}
        step = full.lift(coefficients, rho)
        for run, model in (
            ("network", copy.deepcopy(setting.problem.model)),
            ("linearised", linearize(setting.problem.model)),
        ):
            move(model, step, 1.0)
            end = float((outputs(model, setting.inputs) - flat(setting.targets)).square().sum())
            rows += [
                {"quantity": "loss_ratio", "value": end / start, "predicted": ratio, "run": run, **at},
                {"quantity": f"loss_ratio_error_{run}", "value": end / start - ratio, "tolerance": tolerance, **at},
            ]
            if relative >= 0.1:
                rows.append({"quantity": f"loss_ratio_quotient_{run}", "value": end / start / ratio, **at})
        response = blocks.response(setting.jacobian, rho).numpy(force=True)
        formula = theory.block_diagonal_response(kernels, rho)
        block_condition = float((layer_tops + rho).max() / rho)
        rows.append(
            {
                "quantity": "block_response_error",
                "value": float(np.linalg.norm(response - formula) / np.linalg.norm(formula)),
                "tolerance": TOLERANCE_FACTOR * setting.jacobian.R * epsilon * block_condition,
                **at,
            }
        )
    return rows


def _claims(config: Config) -> list[Claim]:  # noqa: ARG001
    return [
        Claim(
            id="damping-linear",
            statement="After one damped step at η = 1 the loss ratio is Σ g_i² (ρ/(λ_i+ρ))²/Σ g_i² on the linearised network.",
            source=f"derived from {PAPER}, section 2 (theory file, claim 10)",
            measured="Measured minus predicted ratio for ρ from 1e-6 to 100 λ_max(Θ).",
            rule=Identity(),
            estimate=identities,
            expected="supported",
            reason="Mode i contracts by 1 − λ_i/(λ_i + ρ).",
            needs=where(NAME),
            quantities=("loss_ratio_error_linearised",),
        ),
        Claim(
            id="damping-network",
            statement="A network of the middle width obeys the same law where the damping is at least λ_max/10.",
            source=f"derived from {PAPER}, section 2 (theory file, claim 10)",
            measured="Mean quotient of measured and predicted ratio over ρ ≥ 0.1 λ_max(Θ).",
            rule=Equivalence(1.0, 0.05),
            estimate=by_seed,
            expected="supported",
            reason="A damped step is short, so J hardly changes; undamped, what is left is the change of J alone.",
            needs=where(NAME),
            quantities=("loss_ratio_quotient_network",),
        ),
        Claim(
            id="damping-block-diagonal",
            statement="The damped block-diagonal response is Σ_l Θ_l (Θ_l + ρI)⁻¹.",
            source=f"derived from {PAPER}, section 3 (theory file, claim 10)",
            measured="Relative Frobenius distance, for ρ from 1e-6 to 100 λ_max(Θ).",
            rule=Identity(),
            estimate=identities,
            expected="supported",
            reason="The push-through identity, layer by layer.",
            needs=where(NAME),
            quantities=("block_response_error",),
        ),
    ]


PART = Part(NAME, _cells, _measure, _claims, seconds=lambda width: 0.1 + 1.0 * (width / 2048) ** 2)
