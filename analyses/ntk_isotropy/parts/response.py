"""The response at initialisation (claims 1, 2, 4, 6, 8, 14).

The response is measured, not computed from the identity under test: random directions of the outputs go back to the
parameters (`Jᵀ`), through the structure's undamped solve, and forward again (`J`); the residual also goes through the real
forward pass as a finite parameter step. Spectra and diagonals come from `Structure.response`, which is held to the same
probes (`two_ways`).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor

import curvlab
from analyses.estimates import (
    at_largest_width,
    by_seed,
    identities,
    least_by_seed,
    needs_several_widths,
    slope_by_seed,
    worst_by_seed,
)
from analyses.ntk_isotropy.config import Config
from analyses.ntk_isotropy.part import PAPER, Part, cells_of
from analyses.ntk_isotropy.setting import SMOOTH, Setting, flat, make, setting_of
from analyses.part import TOLERANCE_FACTOR, Expectation, Observations, where
from curvlab.fisher import Structure
from curvlab.nn.functional import called_with
from curvlab.study import Cell, Claim, Equivalence, Identity, Inequality

NAME = "response"
FAMILY = ("full", "block-diagonal", "block-tridiagonal", "layer-wise")
OUTSIDE: tuple[tuple[str, str, Expectation, str], ...] = (
    ("diagonal", "exact", "supported", "The diagonal is not in the layer-wise family."),
    ("ekfac", "exact", "open", "EKFAC shares K-FAC's basis but not its spectrum."),
    ("full", "mc", "supported", "With one output a draw rescales the row of a sample by a random number."),
    ("full", "empirical", "supported", "Each sample is scaled by its own residual."),
    ("block-diagonal", "empirical", "supported", "Each sample is scaled by its own residual."),
)
"""Structures and kinds that no theorem covers."""
FINITE_STEP: tuple[tuple[str, float, Expectation, str], ...] = (
    ("smooth", 1e-6, "supported", "A central difference at a relative step of 1e-5 errs by its square."),
    ("kinked", 1e-3, "refuted", "An earlier run saw the kinks that such a step crosses change M r by up to 0.8 %."),
)
"""Kinds of activation, and how near a finite step must come to the response."""
PROBES = 2
"""Random directions of the outputs that are sent through the parameters."""


def _cells(config: Config) -> list[Cell]:
    points: list[Mapping[str, object]] = []
    for structure in config.structures:
        at = {"structure": structure, "kind": "exact", "width": config.swept_widths[0]}
        points += [{**at, "width": width} for width in config.swept_widths]
        points += [{**at, "activation": activation} for activation in config.other_activations]
        points += [{**at, "outputs": outputs} for outputs in config.other_outputs]
        if structure in (*FAMILY, "kfac"):
            points += [{**at, "depth": depth} for depth in config.other_depths]
        if structure in ("full", "block-diagonal", "kfac", "diagonal"):
            points += [{**at, "kind": kind} for kind in config.other_kinds]
    return cells_of(NAME, config, points)


def _structure(cell: Cell, setting: Setting) -> Structure:
    structure = make(str(cell["structure"]), setting.depth)
    kind = str(cell["kind"])
    if kind == "exact":
        return structure.update(setting.rows)
    generator = torch.Generator().manual_seed(int(cell["seed"]))
    rows = curvlab.sqrt_fisher(
        setting.problem.model,
        setting.problem.loss,
        setting.inputs,
        setting.targets,
        kind,  # type: ignore[arg-type]
        generator=generator if kind == "mc" else None,
    )
    return structure.update(rows)


def pull(structure: Structure, setting: Setting, u: Float[Tensor, "K R"]) -> dict[str, Tensor]:
    """Return `F⁺Jᵀu/N`: output directions taken back to the parameters and through the undamped solve."""
    if structure.rows.kind == "exact":
        return structure.lift(structure.rows.dual(u / setting.samples), 0.0)
    back = setting.jacobian.rmatvec(u / setting.samples)
    solved = structure.solve(back, 0.0)
    assert isinstance(solved, dict)
    return solved


def probes(setting: Setting, seed: int) -> Float[Tensor, "K R"]:
    """Return orthonormal random directions of the outputs."""
    J = setting.jacobian
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(J.R, min(PROBES, J.R), generator=generator, dtype=torch.float64)
    orthonormal: Tensor = torch.linalg.qr(drawn).Q
    return orthonormal.T.to(J.dtype).to(J.device)


def measured_response(
    structure: Structure, setting: Setting, directions: Float[Tensor, "K R"]
) -> tuple[Float[Tensor, "L K R"], Float[Tensor, "K T"]]:
    """Send directions of the outputs through `Jᵀ → solve → J`.

    Returns:
        The share of every layer in the response of the training outputs, and the response of the test outputs.
    """
    step = pull(structure, setting, directions)
    shares = [layer.matvec(layer.layout.join(step)) for layer in setting.jacobian.layers]
    return torch.stack(shares), setting.test_jacobian.matvec(step)


def _finite_step(structure: Structure, setting: Setting, response: Float[Tensor, "R R"]) -> float:
    """Relative distance between the response and a central difference through the real forward pass."""
    residual = setting.initial - flat(setting.targets)
    direction = pull(structure, setting, residual[None])
    parameters = {name: p.detach() for name, p in setting.problem.model.named_parameters()}
    size = sum(float(d.square().sum()) for d in direction.values()) ** 0.5
    scale = sum(float(p.square().sum()) for p in parameters.values()) ** 0.5
    epsilon = 1e-5 * scale / size

    def outputs(sign: float) -> Tensor:
        moved = {name: p + sign * epsilon * direction[name][0] for name, p in parameters.items()}
        return flat(called_with(setting.problem.model, moved, (setting.inputs,)))

    with torch.no_grad():
        measured = (outputs(1.0) - outputs(-1.0)) / (2 * epsilon)
    predicted = response @ residual
    return float((measured - predicted).norm() / predicted.norm())


def anisotropy(response: Float[Tensor, "R R"], alpha: float) -> float:
    """‖M − αI‖_F / ‖αI‖_F."""
    identity = torch.eye(len(response), dtype=response.dtype, device=response.device)
    return distance(response, alpha * identity)


def distance(measured: Tensor, expected: Tensor) -> float:
    """‖measured − expected‖_F / ‖expected‖_F."""
    return float((measured - expected).norm() / expected.norm())


def _measure(cell: Cell, config: Config) -> Observations:
    setting = setting_of(cell, config)
    structure = _structure(cell, setting)
    name, exact = str(cell["structure"]), cell["kind"] == "exact"
    directions = probes(setting, int(cell["seed"]))
    shares, tested = measured_response(structure, setting, directions)
    moved = shares.sum(0)
    response = structure.response(setting.jacobian, 0.0) * structure.count / setting.samples
    diagonal = response.diagonal()
    mean = float(diagonal.mean())
    epsilon = torch.finfo(response.dtype).eps
    tolerance = TOLERANCE_FACTOR * len(response) * epsilon * structure.condition_number()
    eigenvalues = torch.linalg.eigvalsh((response + response.T) / 2)
    off_diagonal = float((response - diagonal.diag()).norm() / diagonal.norm())
    rows: list[dict[str, object]] = [
        {"quantity": "alpha", "value": mean},
        {"quantity": "anisotropy", "value": anisotropy(response, mean)},
        {"quantity": "eigenvalue_min", "value": float(eigenvalues[0])},
        {"quantity": "eigenvalue_max", "value": float(eigenvalues[-1])},
        {"quantity": "spread", "value": float(diagonal.std() / mean)},
        {"quantity": "off_diagonal", "value": off_diagonal, "tolerance": tolerance},
        {"quantity": "two_ways", "value": distance(moved, directions @ response.T), "tolerance": tolerance},
        {"quantity": "finite_step", "value": _finite_step(structure, setting, response)},
        *(
            {
                "quantity": "layer_alpha",
                "value": float((share * directions).sum() / len(directions)),
                "layer": index + 1,
            }
            for index, share in enumerate(shares)
        ),
    ]
    if not exact:
        return rows
    predicted, published = setting.alpha(name), setting.published_alpha(name)
    if predicted is not None:
        rows += [
            {"quantity": "alpha_predicted", "value": predicted},
            {"quantity": "alpha_ratio", "value": mean / predicted},
            {"quantity": "distance", "value": distance(moved, predicted * directions), "tolerance": tolerance},
        ]
    if published is not None:
        rows += [
            {"quantity": "alpha_published", "value": published},
            {"quantity": "alpha_over_published", "value": mean / published},
        ]
    if (formula := setting.predicted_test_response(name)) is not None:
        expected = directions @ torch.as_tensor(formula.T, dtype=tested.dtype, device=tested.device)
        rows.append({"quantity": "test_response_error", "value": distance(tested, expected), "tolerance": tolerance})
    if name == "kfac" and setting.plain:
        scales = [float(setting.samples)] * (setting.depth - 1) + [1.0]
        rows += [
            {
                "quantity": "layer_distance" if setting.full_rank(index) else "layer_distance_short_of_rank",
                "value": distance(share, scale * directions),
                "tolerance": tolerance,
                "layer": index + 1,
            }
            for index, (share, scale) in enumerate(zip(shares, scales, strict=True))
        ]
    return rows


def _claims(config: Config) -> list[Claim]:
    exact = {"kind": "exact"}
    claims = [
        Claim(
            id=f"isotropic-{structure}",
            statement=f"At zero damping the {structure} response is αI, at every width, depth, activation and output count.",
            source=f"{PAPER}, Condition 1 and section 3 (theory file, claims 1 and 2)",
            measured="‖(M − αI)U‖_F/‖αU‖_F for random directions U, with the derived α, by Jᵀ → solve → J.",
            rule=Identity(),
            estimate=identities,
            expected="supported",
            reason="Σ_l J_l F⁺ J_lᵀ = 1ᵀΣ⁺1 · I holds at every finite width where all Θ_l are positive definite.",
            needs=where(NAME, structure=structure, **exact),
            quantities=("distance",),
        )
        for structure in FAMILY
        if structure in config.structures
    ]
    if config.structures:
        claims.append(
            Claim(
                id="response-two-ways",
                statement="The response by Jᵀ → solve → J and that by row-side algebra are the same.",
                source="checks the measurement itself",
                measured="Relative distance of the two for random directions, every structure and kind.",
                rule=Identity(),
                estimate=identities,
                expected="supported",
                reason="Push-through identity.",
                needs=where(NAME),
                quantities=("two_ways",),
            )
        )
        tried = (config.activation, *config.other_activations)
        claims += [
            Claim(
                id=f"finite-step-{kind}",
                statement="A finite parameter step through the real forward pass moves the outputs as the response says.",
                source=f"{PAPER}, Condition 1; checks the measurement itself, {kind} activations",
                measured="Relative distance of a central difference along F⁺Jᵀr from M r, largest over the cells of a seed.",
                rule=Inequality(bound, "less"),
                estimate=worst_by_seed,
                expected=expected,
                reason=reason,
                needs=where(NAME, **exact, activation=activations),
                quantities=("finite_step",),
            )
            for kind, bound, expected, reason in FINITE_STEP
            if (activations := tuple(name for name in tried if (name in SMOOTH) == (kind == "smooth")))
        ]
    if "kfac" in config.structures:
        claims += _kfac_claims()
    if "unit-wise" in config.structures:
        claims += _unit_claims(config)
    claims += [
        Claim(
            id=f"test-response-{structure}",
            statement=f"Off the training set the {structure} response is the formula of its structure.",
            source=f"{PAPER}, section 4 (theory file, claim 8)",
            measured="‖(K − K_formula)U‖_F/‖K_formula U‖_F at the test inputs, for random directions U.",
            rule=Identity(),
            estimate=identities,
            expected="supported",
            reason="Exact at finite width with the kernels, or the back-propagated rows, of the actual network.",
            needs=where(NAME, structure=structure, **exact),
            quantities=("test_response_error",),
        )
        for structure in (*FAMILY, "kfac", "unit-wise")
        if structure in config.structures
    ]
    claims += [
        Claim(
            id=f"anisotropic-{structure}" if kind == "exact" else f"anisotropic-{structure}-{kind}",
            statement=f"The {structure} response of the {kind} Fisher is not isotropic.",
            source="no theorem covers it (theory file, claim 14)",
            measured="‖M − ᾱI‖_F/‖ᾱI‖_F with ᾱ = tr M/R, smallest over the widths.",
            rule=Inequality(0.1, "greater"),
            estimate=least_by_seed,
            expected=expected,
            reason=reason,
            needs=where(NAME, structure=structure, kind=kind, outputs=(0, 1)),
            quantities=("anisotropy",),
        )
        for structure, kind, expected, reason in OUTSIDE
        if structure in config.structures and kind in ("exact", *config.other_kinds)
    ]
    return claims


def _kfac_claims() -> list[Claim]:
    at = where(NAME, structure="kfac", kind="exact")
    return [
        Claim(
            id="kfac-layers",
            statement="Literal K-FAC is isotropic layer by layer, with N in every hidden layer and 1 in the last.",
            source=f"derived from {PAPER}, section 3.2 (theory file, claim 4)",
            measured="‖(M_l − α_l I)U‖_F/‖α_l U‖_F of every layer, for random directions U.",
            rule=Identity(),
            estimate=identities,
            expected="supported",
            reason="B and A are Gram matrices over the samples; the last layer's δ is the same for all, so it carries no N. Layers "
            "where a factor is short of rank on the samples are outside the assumptions and left out.",
            needs=at,
            quantities=("layer_distance",),
        ),
        Claim(
            id="kfac-published-alpha",
            statement="The scale of the K-FAC response is α = N·L.",
            source=f"{PAPER}, section 3.2 and published code",
            measured="tr M/(R·N·L).",
            rule=Equivalence(1.0, 0.01),
            estimate=by_seed,
            expected="refuted",
            reason="Literal K-FAC has α = N(L−1) + 1: the last layer contributes 1, not N.",
            needs=at,
            quantities=("alpha_over_published",),
        ),
    ]


def _unit_claims(config: Config) -> list[Claim]:
    relu_one = where(NAME, structure="unit-wise", kind="exact", activation=("relu", ""), outputs=(0, 1))
    swept = where(NAME, structure="unit-wise", kind="exact", activation=config.activation, outputs=(0, 1))
    several = where(NAME, structure="unit-wise", kind="exact", outputs=config.other_outputs)
    return [
        Claim(
            id="unit-wise-diagonal",
            statement="With one output the unit-wise response is diagonal.",
            source=f"derived from {PAPER}, section 3.3 (theory file, claim 6)",
            measured="‖off-diagonal part‖_F/‖diagonal‖_F.",
            rule=Identity(),
            estimate=identities,
            expected="supported",
            reason="K⁺K of a unit projects on the samples that are active at it, if their inputs are independent.",
            needs=relu_one,
            quantities=("off_diagonal",),
        ),
        Claim(
            id="unit-wise-alpha",
            statement="The unit-wise response has the scale α = γ(L−1)M in wide networks.",
            source=f"{PAPER}, section 3.3",
            measured="mean diag(M)/(γ(L−1)M) at the largest width, one output.",
            rule=Equivalence(1.0, 0.02),
            estimate=at_largest_width(by_seed),
            expected="supported",
            reason="About half of the ReLU units are active for each sample; the last layer adds 1, negligible here.",
            needs=relu_one,
            quantities=("alpha_over_published",),
        ),
        Claim(
            id="unit-wise-spread",
            statement="The relative spread of the unit-wise response over samples falls like M^(−1/2).",
            source=f"derived from {PAPER}, section 3.3 (theory file, claim 6)",
            measured="Slope of log(std/mean of diag M) against log width.",
            rule=Equivalence(-0.5, 0.15),
            estimate=slope_by_seed,
            expected="supported",
            reason="The number of active units of a sample is a sum over units; shared inputs correlate samples, not units.",
            assumptions=needs_several_widths,
            needs=swept,
            quantities=("spread",),
        ),
        Claim(
            id="unit-wise-outputs",
            statement="With C > 1 outputs the unit-wise response has the scale γM(L−1), as published for C = 1.",
            source=f"{PAPER}, section 3.3, read literally for C > 1",
            measured="mean diag(M)/(γ(L−1)M) with several outputs.",
            rule=Equivalence(1.0, 0.05),
            estimate=by_seed,
            expected="refuted",
            reason="The Jacobian of a hidden unit has rank N, not NC, so its scale is divided by C (derived).",
            needs=several,
            quantities=("alpha_over_published",),
        ),
        Claim(
            id="unit-wise-outputs-derived",
            statement="With C > 1 outputs the unit-wise response has the mean α = γM(L−1)/C + 1.",
            source="derived (theory file, claim 6)",
            measured="mean diag(M)/α with several outputs.",
            rule=Equivalence(1.0, 0.05),
            estimate=by_seed,
            expected="supported",
            reason="The directions of many units average to I/C; the last layer adds I.",
            needs=several,
            quantities=("alpha_ratio",),
        ),
    ]


PART = Part(NAME, _cells, _measure, _claims, seconds=lambda width: 0.03 + 0.5 * (width / 2048) ** 2)
