"""Damping: one step of exact natural gradient, and the damped block-diagonal response (claim 10)."""

import numpy as np

from analyses.claims import claim
from analyses.descent import move, outputs
from analyses.ntk_isotropy.config import Config
from analyses.ntk_isotropy.points import PAPER, experiment, page, seconds
from analyses.ntk_isotropy.setting import Setting
from curvlab import study, theory
from curvlab.fisher import BlockDiagonal, Full
from curvlab.nn import linearize

RELATIVE_DAMPINGS = (1e-6, 1e-4, 1e-2, 1e-1, 1.0, 1e2)
"""ρ in units of λ_max(Θ)."""
JUDGED = (1e-2, 1e-1)
"""Those of which the law is judged on the network: from λ_max on it holds by construction, for the step is short."""


def _measure(cell: study.Cell, context: study.Context[Config]) -> study.Observations:
    setting = Setting.of(cell, context.config)
    kernels = setting.kernels
    kernel = kernels.sum(0)
    values, _ = theory.kernel_modes(kernel)
    residual = setting.residual
    full, blocks = Full().update(setting.rows), BlockDiagonal().update(setting.rows)
    coefficients = full.rows.dual(residual / setting.samples)
    start = float(residual.square().sum())
    layer_tops = np.linalg.eigvalsh(kernels)[:, -1]
    rows = []
    for relative in RELATIVE_DAMPINGS:
        rho = relative * float(values[0])
        predicted = theory.damped_loss_ratio(kernel, residual.numpy(force=True), rho)
        tolerance = setting.tolerance(float(values[0] + rho) / rho)
        at = {"rho_relative": relative}
        step = full.lift(coefficients, rho)
        for run, model in (("network", setting.network()), ("linearised", linearize(setting.problem.model))):
            move(model, step, 1.0)
            ratio = float((outputs(model, setting.inputs) - setting.targets).square().sum()) / start
            rows += [
                study.observed("loss_ratio", ratio, predicted=predicted, run=run, **at),
                study.observed(f"loss_ratio_error_{run}", ratio - predicted, tolerance=tolerance, **at),
                study.observed(f"loss_ratio_quotient_{run}", ratio / predicted, **at),
            ]
        response = blocks.response(setting.jacobian, rho).numpy(force=True)
        formula = theory.block_diagonal_response(kernels, rho)
        error = np.linalg.norm(response - formula) / np.linalg.norm(formula)
        tolerance = setting.tolerance(float((layer_tops + rho).max() / rho))
        rows.append(study.observed("block_response_error", error, tolerance=tolerance, **at))
    return rows


CLAIMS = [
    claim("damping-linear", page(f"derived from {PAPER}, section 2", "claim 10"), study.Identity("loss_ratio_error_linearised"),
          "After one damped step at η = 1 the loss ratio is Σ g_i² (ρ/(λ_i+ρ))²/Σ g_i² on the linearised network.",
          "Measured minus predicted ratio for ρ from 1e-6 to 100 λ_max(Θ).",
          study.supported("Mode i contracts by 1 − λ_i/(λ_i + ρ)."), group="self-check"),
    *(
        claim(f"damping-network-{relative:g}", page(f"derived from {PAPER}, section 2", "claim 10"),
              study.Equivalence("loss_ratio_quotient_network", 1.0, 0.05, centre="geometric mean"),
              f"A wide network obeys the same law at a damping of {relative:g} λ_max.",
              "Quotient of measured and predicted ratio at the largest width.",
              study.undecided("The less damping, the less is left of the loss, and the more of that is the change of J."),
              group="derived", estimate=study.among(study.by_seed, rho_relative=relative))
        for relative in JUDGED
    ),
    claim("damping-block-diagonal", page(f"derived from {PAPER}, section 3", "claim 10"), study.Identity("block_response_error"),
          "The damped block-diagonal response is Σ_l Θ_l (Θ_l + ρI)⁻¹.",
          "Relative Frobenius distance, for ρ from 1e-6 to 100 λ_max(Θ).",
          study.supported("The push-through identity, layer by layer."), group="self-check"),
]  # fmt: skip

DAMPING = experiment(
    lambda config: [{"width": config.swept_widths[-1]}],
    name="damping",
    measure=_measure,
    claims=CLAIMS,
    seconds=seconds(0.1, 3.0),
)
