"""Gradient descent is not isotropic: its response is the kernel itself (claim 9)."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from analyses.estimates import at_largest_width, by_seed, identities, least_by_seed
from analyses.ntk_isotropy.config import Config
from analyses.ntk_isotropy.part import PAPER, Part, cells_of
from analyses.ntk_isotropy.parts.response import anisotropy
from analyses.ntk_isotropy.parts.steps import train
from analyses.ntk_isotropy.setting import Setting, flat, setting_of
from analyses.part import TOLERANCE_FACTOR, Observations, where
from curvlab import theory
from curvlab.nn import linearize
from curvlab.study import Cell, Claim, Identity, Inequality

NAME = "gradient-descent"
STEPS = 10
MODES = 8
"""Leading eigenvectors of the kernel that are followed one by one."""


def _cells(config: Config) -> list[Cell]:
    return cells_of(NAME, config, [{"width": width} for width in config.swept_widths])


def _gradient(setting: Setting, model: nn.Module) -> dict[str, Tensor]:
    parameters = dict(model.named_parameters())
    loss = setting.problem.loss(model(setting.inputs), setting.targets)
    return dict(zip(parameters, torch.autograd.grad(loss, list(parameters.values())), strict=True))


def _measure(cell: Cell, config: Config) -> Observations:
    setting = setting_of(cell, config)
    kernel = setting.kernels.sum(0)
    values, vectors = theory.kernel_modes(kernel)
    eta = 1 / float(values[0])

    def direction(model: nn.Module, _: Float[Tensor, " R"]) -> Mapping[str, Tensor]:
        return _gradient(setting, model)

    f, y = setting.initial.numpy(force=True), flat(setting.targets).numpy(force=True)
    predicted = theory.predict_train(f, y, kernel, eta, range(1, STEPS + 1))
    rates = theory.gd_contraction(values, eta) ** STEPS
    start = vectors.T @ (f - y)
    tolerance = (
        TOLERANCE_FACTOR
        * len(f)
        * STEPS
        * np.finfo(np.float64).eps
        * max(1.0, float(np.linalg.norm(f) / np.linalg.norm(f - y)))
    )
    response = torch.as_tensor(kernel)
    rows: list[dict[str, object]] = [
        {"quantity": "anisotropy", "value": anisotropy(response, float(response.diagonal().mean()))},
        {"quantity": "condition", "value": float(values[0] / values[-1])},
    ]
    runs: dict[str, nn.Module] = {"network": copy.deepcopy(setting.problem.model)}
    if int(cell["width"]) <= config.middle_width:
        runs["linearised"] = linearize(setting.problem.model)
    for run, model in runs.items():
        trained, _ = train(model, setting, eta, STEPS, direction)
        error = np.linalg.norm(trained[-1] - predicted[-1]) / np.linalg.norm(f - y)
        rows.append({"quantity": f"train_error_{run}", "value": float(error), "tolerance": tolerance, "run": run})
        end = vectors.T @ (trained[-1] - y)
        rows += [
            {
                "quantity": "mode_ratio",
                "value": float(end[i] / start[i]),
                "predicted": float(rates[i]),
                "mode": i + 1,
                "run": run,
            }
            for i in range(min(MODES, len(start)))
        ]
    return rows


def _claims(config: Config) -> list[Claim]:  # noqa: ARG001
    return [
        Claim(
            id="gradient-descent-anisotropic",
            statement="The response of gradient descent, the kernel Θ, is not isotropic.",
            source=f"{PAPER}, section 4 (theory file, claim 9)",
            measured="‖Θ − ᾱI‖_F/‖ᾱI‖_F, smallest over the widths.",
            rule=Inequality(0.1, "greater"),
            estimate=least_by_seed,
            expected="supported",
            reason="Similar inputs have similar gradients.",
            needs=where(NAME),
            quantities=("anisotropy",),
        ),
        Claim(
            id="gradient-descent-linear",
            statement="On the linearised network mode i of the residual contracts by 1 − ηλ_i per step.",
            source=f"{PAPER}, section 4 (theory file, claim 9)",
            measured=f"Distance of the training outputs from f_0 + (I − (I − ηΘ)^t)(y − f_0) after {STEPS} steps at η = 1/λ_max.",
            rule=Identity(),
            estimate=identities,
            expected="supported",
            reason="Without change of J the dynamics is linear.",
            needs=where(NAME),
            quantities=("train_error_linearised",),
        ),
        Claim(
            id="gradient-descent-network",
            statement="A wide network follows the linear gradient-descent dynamics of its initial kernel.",
            source=f"{PAPER}, section 4 (theory file, claim 9)",
            measured="The same distance for the network itself, relative to ‖f_0 − y‖, at the largest width.",
            rule=Inequality(0.05, "less"),
            estimate=at_largest_width(by_seed),
            expected="supported",
            reason="The change of J is O(M^(−1/2)).",
            needs=where(NAME),
            quantities=("train_error_network",),
        ),
    ]


PART = Part(NAME, _cells, _measure, _claims, seconds=lambda width: 0.05 + 1.5 * (width / 2048) ** 2)
