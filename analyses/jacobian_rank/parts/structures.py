"""What approximations of the Fisher matrix leave of full rank and of the rate, on a network with several layers."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import torch

import curvlab
from analyses.estimates import by_seed, identities
from analyses.jacobian_rank.config import Config
from analyses.jacobian_rank.descent import Direction, descend, gradient, natural
from analyses.jacobian_rank.networks import network_of
from analyses.jacobian_rank.part import PAPER, Part, cells_of
from analyses.jacobian_rank.setting import Setting, setting_of
from analyses.part import Observations, where
from curvlab.fisher import STRUCTURES
from curvlab.study import Cell, Claim, Identity, Inequality

NAME = "structures"
STEPS = 5
NEEDS_SIGMA = "layer-wise"
"""A family rather than one structure: the members that have a name are here."""


def _structures(config: Config) -> list[str]:
    return [structure for structure in config.structures if structure != NEEDS_SIGMA]


def _cells(config: Config) -> list[Cell]:
    at = {"network": "mlp", "width": config.swept_widths[0], "activation": config.activation[0]}
    return cells_of(NAME, config, [{**at, "structure": structure} for structure in _structures(config)])


def _remaining(setting: Setting, direction: Direction, eta: float) -> float:
    """‖r‖²/‖r(0)‖² after some steps."""
    path = descend(copy.deepcopy(setting.problem.model), setting, direction, eta, STEPS)
    squared = np.square(path - setting.targets.numpy(force=True)).sum(1)
    return float(squared[-1] / squared[0])


def _measure(cell: Cell, config: Config) -> Observations:
    setting = setting_of(cell, config)
    setting = Setting(replace(setting.problem, model=network_of(setting, cell)))
    structure, data = STRUCTURES[str(cell["structure"])](), setting.problem.train
    structure.update(curvlab.sqrt_fisher(setting.problem.model, setting.problem.loss, *data))
    response = structure.response(setting.jacobian, 0.0)
    values = torch.linalg.eigvalsh((response + response.T) / 2)
    missing = len(values) - int(torch.linalg.matrix_rank(response, hermitian=True))
    largest = float(values[-1])
    left = _remaining(setting, natural(STRUCTURES[str(cell["structure"])](), setting), 1 / largest)
    left_by_descent = _remaining(setting, gradient(setting), 1 / float(setting.eigenvalues[-1]))
    return [
        {"quantity": "missing", "value": missing, "tolerance": 0.0},
        {"quantity": "condition", "value": largest / float(values.abs().min())},
        {"quantity": "remaining", "value": left},
        {"quantity": "log_gain", "value": float(np.log10(left / left_by_descent))},
    ]


def _claims(config: Config) -> list[Claim]:
    claims = []
    for structure in _structures(config):
        at = where(NAME, structure=structure)
        claims += [
            Claim(
                id=f"response-rank-{structure}",
                statement=f"The {structure} step can move the outputs in every direction.",
                source=f"{PAPER}, condition 1, for approximations (derived)",
                measured="Dimensions missing in the rank of J F⁺ Jᵀ of an MLP with three layers.",
                rule=Identity(),
                estimate=identities,
                expected="supported",
                reason="F⁺ is positive on the range of Jᵀ.",
                needs=at,
                quantities=("missing",),
            ),
            Claim(
                id=f"faster-{structure}",
                statement=f"The {structure} step contracts the residual faster than gradient descent, each at its 1/λ_max.",
                source=f"{PAPER}, rates (theory file, claim 6, for approximations)",
                measured=f"log10 of what {STEPS} steps leave of ‖r‖², less that of gradient descent.",
                rule=Inequality(0.0, "less"),
                estimate=by_seed,
                expected="supported" if structure in ("full", "block-diagonal", "kfac") else "open",
                reason="Its response is better conditioned than the kernel.",
                needs=at,
                quantities=("log_gain",),
            ),
        ]
    return claims


PART = Part(NAME, _cells, _measure, _claims, seconds=lambda _: 0.1)
