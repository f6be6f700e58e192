"""Gradient descent is not isotropic: its response is the kernel itself (claim 9)."""

import numpy as np
import torch
from torch import nn

from analyses.claims import claim
from analyses.descent import gradient
from analyses.ntk_isotropy.config import Config
from analyses.ntk_isotropy.descent import train
from analyses.ntk_isotropy.points import PAPER, experiment, page, seconds
from analyses.ntk_isotropy.responses import anisotropy
from analyses.ntk_isotropy.setting import Setting
from curvlab import study, theory
from curvlab.nn import linearize
from curvlab.problems import IMAGE_SETS

STEPS = 10
MODES = 8
"""Leading eigenvectors of the kernel that are followed one by one."""
CLOSE = 0.1
"""Distance of a mode's contraction from its law that counts as following it."""


def _points(config: Config) -> list[study.Point]:
    return [{"width": width} for width in config.swept_widths]


def _measure(cell: study.Cell, context: study.Context[Config]) -> study.Observations:
    setting = Setting.of(cell, context.config)
    kernel = setting.kernels.sum(0)
    values, vectors = theory.kernel_modes(kernel)
    eta = 1 / float(values[0])

    f, y = setting.initial.numpy(force=True), setting.targets.numpy(force=True)
    predicted = theory.predict_train(f, y, kernel, eta, range(1, STEPS + 1))
    rates = theory.gd_contraction(values, eta) ** STEPS
    start = vectors.T @ (f - y)
    distance = np.linalg.norm(f - y)
    tolerance = setting.tolerance(STEPS * max(1.0, float(np.linalg.norm(f) / distance)))
    response = torch.as_tensor(kernel)
    rows = [
        study.observed("anisotropy", anisotropy(response, float(response.diagonal().mean()))),
        study.observed("condition", float(values[0] / values[-1])),
    ]
    if context.config.problem in (*IMAGE_SETS, "karakida-osawa") and setting.activation == "relu":
        limit = (
            theory.infinite_width_kernels(setting.inputs.numpy(force=True), depth=setting.depth).ntk / setting.samples
        )
        rows.append(study.observed("kernel_distance", np.linalg.norm(kernel - limit) / np.linalg.norm(limit)))
    runs: dict[str, nn.Module] = {"network": setting.network()}
    if int(cell["width"]) <= context.config.middle_width:
        runs["linearised"] = linearize(setting.problem.model)
    direction = gradient(setting.loss)
    for run, model in runs.items():
        trained, _, status = train(model, setting, eta, STEPS, direction)
        at = {"run": run, **status}
        error = np.linalg.norm(trained[-1] - predicted[-1]) / distance
        rows.append(study.observed(f"train_error_{run}", error, tolerance=tolerance, **at))
        ratios = vectors.T @ (trained[-1] - y) / start
        pairs = list(zip(ratios[:MODES], rates[:MODES], strict=True))
        apart = float(np.median([abs(v - rate) for v, rate in pairs[1:]]))
        rows += [study.observed(f"mode_error_{run}", apart, **at)] + [
            study.observed("mode_ratio", v, predicted=rate, mode=i, **at) for i, (v, rate) in enumerate(pairs, 1)
        ]
    return rows


CLAIMS = [
    claim("gradient-descent-modes", page(f"{PAPER}, section 4", "claim 9"),
          study.Inequality("mode_error_network", "less", CLOSE, centre="geometric mean"),
          "In a wide network every leading mode of the residual contracts at its own rate, by (1 − ηλ_i)^t.",
          f"|contraction − (1 − ηλ_i)^{STEPS}| at the largest width, median of the modes 2 to {MODES}.",
          study.supported("The response of gradient descent is the kernel Θ, which changes little."), group="paper",
          estimate=study.at_largest_width(study.by_seed)),
    claim("kernel-limit", page(f"{PAPER}, section 2", "setting"), study.Equivalence("kernel_distance", -0.5, 0.1, centre="mean"),
          "The kernel Θ of a ReLU network approaches that of infinite width like M^(−1/2).",
          "Slope of log ‖Θ − Θ_∞‖_F/‖Θ_∞‖_F against log width.",
          study.supported("Θ is a sum over units of terms that are nearly independent."), group="derived",
          at={"activation": ("relu", "")}, estimate=study.slope_by_seed, assumptions=study.needs_several_widths),
    claim("gradient-descent-linear", page(f"{PAPER}, section 4", "claim 9"), study.Identity("train_error_linearised"),
          "On the linearised network mode i of the residual contracts by 1 − ηλ_i per step.",
          f"Distance of the training outputs from f_0 + (I − (I − ηΘ)^t)(y − f_0) after {STEPS} steps at η = 1/λ_max.",
          study.supported("Without change of J the dynamics is linear."), group="self-check"),
    claim("gradient-descent-network", page(f"{PAPER}, section 4", "claim 9"),
          study.Inequality("train_error_network", "less", 0.05, centre="geometric mean"),
          "A wide network follows the linear gradient-descent dynamics of its initial kernel.",
          "The same distance for the network itself, relative to ‖f_0 − y‖, at the largest width.",
          study.supported("The change of J is O(M^(−1/2))."), group="paper", estimate=study.at_largest_width(study.by_seed)),
]  # fmt: skip

GRADIENT_DESCENT = experiment(
    _points, name="gradient-descent", measure=_measure, claims=CLAIMS, seconds=seconds(0.05, 1.5)
)
