"""The block-tridiagonal form: covered and excluded depths, layers that move, and the limit ρ → 0 (claim 3)."""

import numpy as np
import torch

from analyses.claims import claim
from analyses.descent import length
from analyses.ntk_isotropy.config import Config
from analyses.ntk_isotropy.points import LEFT, LEFT_FROM, PAPER, experiment, page, seconds
from analyses.ntk_isotropy.responses import anisotropy
from analyses.ntk_isotropy.setting import Setting
from curvlab import study, theory
from curvlab.fisher import BlockTridiagonal

RELATIVE_DAMPINGS = (1e-2, 1e-4, 1e-6, 1e-8, 1e-10)
"""ρ in units of λ_max(Θ)."""


def _depths(config: Config) -> tuple[int, ...]:
    return tuple(sorted({config.depth, *config.other_depths}))


def _points(config: Config) -> list[study.Point]:
    if "block-tridiagonal" not in config.structures:
        return []
    return [{"depth": depth, "width": config.swept_widths[0]} for depth in _depths(config)]


def _measure(cell: study.Cell, context: study.Context[Config]) -> study.Observations:
    setting = Setting.of(cell, context.config)
    structure = BlockTridiagonal().update(setting.rows)
    sigma = theory.tridiagonal_sigma(setting.depth)
    kernels, tests = setting.kernels, setting.test_kernels
    top = float(np.linalg.eigvalsh(kernels.sum(0))[-1])
    values, floor = structure.eigvalsh(), 1e-12 * structure.largest_eigenvalue()
    alpha = setting.alpha("block-tridiagonal")
    assert alpha is not None
    coefficients = structure.rows.dual(setting.residual / setting.samples)
    rows = [
        study.observed("negative_share", float((values < -floor).sum()) / float((values.abs() > floor).sum())),
        *_moved(setting, structure.lift(coefficients, 0.0), setting.tolerance(structure.condition_number())),
    ]
    for relative in RELATIVE_DAMPINGS:
        rho = relative * top
        response = structure.response(setting.jacobian, rho)
        tested = structure.response(setting.jacobian, rho, test=setting.test_jacobian).numpy(force=True)
        formula = theory.layer_wise_response(sigma, kernels, rho, test_kernels=tests)
        error = float(np.linalg.norm(tested - formula) / np.linalg.norm(formula))
        step = structure.lift(coefficients, rho)
        system = np.abs(theory.curvature_eigenvalues(sigma, kernels) + rho)
        tolerance = setting.tolerance(float(system.max() / system.min()))
        at = {"rho_relative": relative}
        rows += [
            study.observed("damped_alpha_ratio", float(response.diagonal().mean()) / alpha, **at),
            study.observed("damped_anisotropy", anisotropy(response, alpha), **at),
            study.observed("step_norm", length(step), **at),
            study.observed("damped_test_error", error, tolerance=tolerance, **at),
        ]
    return rows


def _moved(setting: Setting, step: dict[str, torch.Tensor], tolerance: float) -> list[dict[str, object]]:
    """Share of each layer in the step's norm, with the pattern that c predicts where Σ is invertible."""
    norms = [length({name: step[name] for name in layer.layout.names}) for layer in setting.jacobian.layers]
    covered = theory.tridiagonal_covered(setting.depth)
    c = theory.layer_coefficients(theory.tridiagonal_sigma(setting.depth)) if covered else [None] * setting.depth
    names = ["moved" if weight is None or abs(weight) > 0.5 else "moved_though_still" for weight in c]
    return [
        study.observed(name, norm / max(norms), tolerance=tolerance, layer=layer)
        for layer, (name, norm) in enumerate(zip(names, norms, strict=True), 1)
    ]


def _claims(config: Config) -> list[study.Claim]:
    excluded = {"depth": tuple(depth for depth in _depths(config) if not theory.tridiagonal_covered(depth))}
    return [
        claim("tridiagonal-still-layers", page(f"derived from {PAPER}, section 3.2", "claim 3"),
              study.Identity("moved_though_still"),
              "Undamped block-tridiagonal natural gradient moves only the layers with c_l = 1.",
              "Norm of the step in the layers with c_l = 0, relative to the largest layer.",
              study.supported("Δθ_l = −(η/N) c_l J_lᵀ Θ_l⁻¹ r where Σ is invertible."), group="derived"),
        claim("tridiagonal-excluded", page("derived; the paper excludes these depths because Σ is singular", "claim 3"),
              study.Equivalence("damped_alpha_ratio", 1.0, 0.01, centre="geometric mean"),
              "At the excluded depths L = 3s+2 the damped response has the isotropic limit α = s+1 as ρ → 0.",
              f"mean diag(M)/(s+1) at ρ = {RELATIVE_DAMPINGS[-1]:g} λ_max(Θ).",
              study.supported("1 lies in the range of the singular Σ, so 1ᵀΣ⁺1 exists and no 1/ρ term arises."), group="derived",
              at=excluded,
              estimate=study.among(study.by_seed, rho_relative=RELATIVE_DAMPINGS[-1])),
        claim("tridiagonal-excluded-anisotropy", page("derived", "claim 3"),
              study.Inequality("damped_anisotropy", "less", LEFT, centre="geometric mean"),
              "At the excluded depths the response at small damping is as isotropic as its limit.",
              f"‖M − αI‖_F/‖αI‖_F at ρ = {RELATIVE_DAMPINGS[-1]:g} λ_max(Θ), largest of a seed.",
              study.supported("The distance from the limit is of the order of ρ/λ_min of the layers' kernels."), group="derived",
              at=excluded, estimate=study.among(study.worst_by_seed, rho_relative=RELATIVE_DAMPINGS[-1]),
              bound_from=LEFT_FROM),
        claim("tridiagonal-damped-test", page(f"{PAPER}, section 3 with damping, derived", "claims 2 and 10"),
              study.Identity("damped_test_error"),
              "The damped block-tridiagonal response off the training set is Σ_l Θ_l(x', X) Z_l.",
              "Relative Frobenius distance from the dual formula, all dampings and depths.",
              study.supported("The push-through identity of the family holds for any symmetric Σ where F + ρI is invertible."),
              group="self-check"),
    ]  # fmt: skip


TRIDIAGONAL = experiment(_points, name="tridiagonal", measure=_measure, claims=_claims, seconds=seconds(0.05, 0.3))
