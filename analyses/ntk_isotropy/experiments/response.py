"""The response at initialisation (claims 1, 2, 4, 6, 8, 14).

Spectra and diagonals come from `Structure.response`, which is held to the response of random directions (`two_ways`).
"""

from functools import partial

import torch

import curvlab
from analyses.claims import claim
from analyses.ntk_isotropy.config import Config
from analyses.ntk_isotropy.points import LEFT, LEFT_FROM, PAPER, base, experiment, page, seconds
from analyses.ntk_isotropy.responses import anisotropy, distance, finite_step, measured_response, probes
from analyses.ntk_isotropy.setting import SHORT_OF_RANK, SIGMAS, SMOOTH, Setting, make
from curvlab import study
from curvlab.fisher import Structure

UNCOVERED: tuple[tuple[str, str, study.Expected], ...] = (
    ("diagonal", "exact", study.supported("The diagonal is not in the layer-wise family.")),
    ("ekfac", "exact", study.undecided("EKFAC shares K-FAC's basis but not its spectrum.", explored=12)),
    ("full", "mc", study.supported("With one output a draw rescales the row of a sample by a random number.")),
    ("full", "empirical", study.supported("Each sample is scaled by its own residual.")),
    ("block-diagonal", "empirical", study.supported("Each sample is scaled by its own residual.")),
)
"""Structures and kinds that no theorem covers."""


def _points(config: Config) -> list[study.Point]:
    wanted: list[study.Point] = []
    for structure in config.structures:
        at = {"structure": structure, "kind": "exact", "width": config.swept_widths[0]}
        wanted += [{**at, "width": width} for width in config.swept_widths]
        wanted += [{**at, "activation": activation} for activation in config.other_activations]
        several = {**at, "width": config.middle_width} if structure == "kfac" else at
        wanted += [{**several, "outputs": outputs} for outputs in config.other_outputs]
        if structure in (*SIGMAS, "kfac"):
            wanted += [{**at, "depth": depth} for depth in config.other_depths]
        if structure in ("full", "block-diagonal", "kfac", "diagonal"):
            wanted += [{**at, "kind": kind} for kind in config.other_kinds]
    return wanted


def _structure(cell: study.Cell, setting: Setting) -> Structure:
    structure = make(str(cell["structure"]))
    kind = str(cell["kind"])
    if kind == "exact":
        return structure.update(setting.rows)
    draws = study.generator(int(cell["seed"]), "labels") if kind == "mc" else None
    problem = setting.problem
    rows = curvlab.sqrt_fisher(problem.model, problem.loss, *problem.train, kind, generator=draws)  # type: ignore[arg-type]
    return structure.update(rows)


def _measure(cell: study.Cell, context: study.Context[Config]) -> study.Observations:
    setting = Setting.of(cell, context.config)
    structure = _structure(cell, setting)
    name, exact = str(cell["structure"]), cell["kind"] == "exact"
    directions = probes(setting, int(cell["seed"]))
    shares, tested = measured_response(structure, setting, directions)
    moved = shares.sum(0)
    response = structure.response(setting.jacobian, 0.0) * structure.count / setting.samples
    diagonal = response.diagonal()
    mean = float(diagonal.mean())
    tolerance = setting.tolerance(structure.condition_number())
    eigenvalues = torch.linalg.eigvalsh((response + response.T) / 2)
    off_diagonal = float((response - diagonal.diag()).norm() / diagonal.norm())
    rows = [
        study.observed("alpha", mean),
        study.observed("anisotropy", anisotropy(response, mean), tolerance=tolerance),
        study.observed("eigenvalue_min", float(eigenvalues[0])),
        study.observed("eigenvalue_max", float(eigenvalues[-1])),
        study.observed("spread", float(diagonal.std() / mean)),
        study.observed("off_diagonal", off_diagonal, tolerance=tolerance),
        study.observed("two_ways", distance(moved, directions @ response.T), tolerance=tolerance),
        study.observed("finite_step", finite_step(structure, setting, response)),
    ]
    scales = (shares * directions).sum((1, 2)) / len(directions)
    rows += [study.observed("layer_alpha", scale, layer=layer) for layer, scale in enumerate(scales, 1)]
    if not exact:
        return rows
    predicted, published = setting.alpha(name), setting.published_alpha(name)
    if predicted is not None:
        rows += [
            study.observed("alpha_predicted", predicted),
            study.observed("alpha_ratio", mean / predicted),
            study.observed("distance", distance(moved, predicted * directions), tolerance=tolerance),
        ]
    if published is not None:
        rows += [study.observed("alpha_published", published), study.observed("alpha_over_published", mean / published)]
    if (formula := setting.predicted_test_response(name)) is not None:
        expected = directions @ torch.as_tensor(formula.T, dtype=tested.dtype, device=tested.device)
        rows.append(study.observed("test_response_error", distance(tested, expected), tolerance=tolerance))
    if name == "kfac" and setting.plain:
        for index, share in enumerate(shares):
            scale = 1.0 if index == setting.depth - 1 else float(setting.samples)
            at = {"layer": index + 1, **({} if setting.full_rank(index) else study.outside(SHORT_OF_RANK))}
            error = distance(share, scale * directions)
            rows.append(study.observed("layer_distance", error, tolerance=tolerance, **at))
    return rows


def _claims(config: Config) -> list[study.Claim]:
    return [
        *(_isotropic(structure) for structure in SIGMAS),
        claim("isotropic-ekfac", page("no theorem covers it", "claim 14"), study.Identity("anisotropy"),
              "At zero damping the ekfac response is a multiple of I.",
              "‖M − ᾱI‖_F/‖ᾱI‖_F with ᾱ = tr M/R.",
              study.refuted("EKFAC shares K-FAC's basis but not its spectrum.", explored=12), group="exploration",
              at={"structure": "ekfac", "kind": "exact", "outputs": (0, 1)}),
        claim("response-two-ways", "checks the measurement itself", study.Identity("two_ways"),
              "The response by Jᵀ → solve → J and that by row-side algebra are the same.",
              "Relative distance of the two for random directions, every structure and kind.",
              study.supported("Push-through identity."), group="self-check"),
        claim("finite-step", "checks the measurement itself", study.Always("finite_step", "less", 1e-6),
              "A finite parameter step through the real forward pass moves the outputs as the response says.",
              "Relative distance of a central difference along F⁺Jᵀr from M r, smooth activations.",
              study.supported("A central difference at a relative step of 1e-5 errs by its square; the kinks of ReLU would "
                              "add to that."),
              group="self-check", at={"kind": "exact", "activation": tuple(sorted(SMOOTH))},
              bound_from="1e-5 squared, and round-off"),
        *_kfac(config),
        *_unit_wise(config),
        *(_off_training(structure) for structure in (*SIGMAS, "kfac", "unit-wise")),
        *(_anisotropic(*case) for case in UNCOVERED),
    ]  # fmt: skip


def _isotropic(structure: str) -> study.Claim:
    return claim(
        f"isotropic-{structure}", page(f"{PAPER}, Condition 1 and section 3", "claims 1 and 2"), study.Identity("distance"),
        f"At zero damping the {structure} response is αI, at every width, depth, activation and output count.",
        "‖(M − αI)U‖_F/‖αU‖_F for random directions U, with the derived α, by Jᵀ → solve → J.",
        study.supported("Σ_l J_l F⁺ J_lᵀ = 1ᵀΣ⁺1 · I holds at every finite width where all Θ_l are positive definite."),
        group="paper", at={"structure": structure, "kind": "exact"},
    )  # fmt: skip


def _kfac(config: Config) -> list[study.Claim]:
    layers = partial(
        claim, source=page(f"derived from {PAPER}, section 3.2", "claim 4"), rule=study.Identity("layer_distance"),
        measured="‖(M_l − α_l I)U‖_F/‖α_l U‖_F of every layer, for random directions U.", group="derived",
        expected=study.supported("B and A are Gram matrices over the samples; the last layer's δ is the same for all, so it "
                                 "carries no N. Layers where a factor is short of rank on the samples are outside the "
                                 "assumptions and left out."),
    )  # fmt: skip
    at = {"structure": "kfac", "kind": "exact"}
    one = {**at, "outputs": (0, 1)}
    return [
        layers("kfac-layers", at=one,
               statement="Literal K-FAC is isotropic layer by layer, with N in every hidden layer and 1 in the last."),
        layers("kfac-layers-outputs",
               statement="With C > 1 outputs and NC ≤ M literal K-FAC has these scales, too.",
               at={**at, "outputs": config.other_outputs}),
        claim("kfac-published-alpha", f"{PAPER}, section 3.2 and published code",
              study.Equivalence("alpha_over_published", 1.0, 0.01, centre="geometric mean"),
              "The scale of the K-FAC response is α = N·L.",
              "tr M/(R·N·L), one output, mean over depths, widths and activations.",
              study.refuted("Literal K-FAC has α = N(L−1) + 1: the last layer contributes 1, not N."), group="paper", at=one),
    ]  # fmt: skip


def _unit_wise(config: Config) -> list[study.Claim]:
    at = {"structure": "unit-wise", "kind": "exact"}
    one_relu = {**at, "outputs": (0, 1), "activation": ("relu", "")}
    several = {**at, "outputs": config.other_outputs}
    return [
        claim("unit-wise-diagonal", page(f"derived from {PAPER}, section 3.3", "claim 6"), study.Identity("off_diagonal"),
              "With one output the unit-wise response is diagonal.",
              "‖off-diagonal part‖_F/‖diagonal‖_F.",
              study.supported("K⁺K of a unit projects on the samples that are active at it, if their inputs are independent."),
              group="derived", at=one_relu),
        claim("unit-wise-alpha", f"{PAPER}, section 3.3",
              study.Equivalence("alpha_over_published", 1.0, 0.02, centre="geometric mean"),
              "The unit-wise response has the scale α = γ(L−1)M in wide networks.",
              "mean diag(M)/(γ(L−1)M) at the largest width, one output.",
              study.supported("About half of the ReLU units are active for each sample; the last layer adds 1, negligible "
                              "here."),
              group="paper", at=one_relu, estimate=study.at_largest_width(study.by_seed)),
        claim("unit-wise-spread", page(f"derived from {PAPER}, section 3.3", "claim 6"),
              study.Equivalence("spread", -0.5, 0.1, centre="mean"),
              "The relative spread of the unit-wise response over samples falls like M^(−1/2).",
              "Slope of log(std/mean of diag M) against log width.",
              study.supported("The number of active units of a sample is a sum over units; shared inputs correlate samples, "
                              "not units."),
              group="derived", at={**at, "outputs": (0, 1), "activation": base(config)["activation"]}, estimate=study.slope_by_seed,
              assumptions=study.needs_several_widths),
        claim("unit-wise-outputs", f"{PAPER}, section 3.3, read literally for C > 1",
              study.Equivalence("alpha_over_published", 1.0, 0.05, centre="geometric mean"),
              "With C > 1 outputs the unit-wise response has the scale γM(L−1), as published for C = 1.",
              "mean diag(M)/(γ(L−1)M) with several outputs.",
              study.refuted("The Jacobian of a hidden unit has rank N, not NC, so its scale is divided by C (derived)."),
              group="derived", at=several),
        claim("unit-wise-outputs-derived", page("derived", "claim 6"),
              study.Equivalence("alpha_ratio", 1.0, 0.05, centre="geometric mean"),
              "With C > 1 outputs the unit-wise response has the mean α = γM(L−1)/C + 1.",
              "mean diag(M)/α with several outputs.",
              study.supported("The directions of many units average to I/C; the last layer adds I."), group="derived",
              at=several),
    ]  # fmt: skip


def _off_training(structure: str) -> study.Claim:
    return claim(
        f"test-response-{structure}", page(f"{PAPER}, section 4", "claim 8"), study.Identity("test_response_error"),
        f"Off the training set the {structure} response is the formula of its structure.",
        "‖(K − K_formula)U‖_F/‖K_formula U‖_F at the test inputs, for random directions U.",
        study.supported("Exact at finite width with the kernels, or the back-propagated rows, of the actual network."),
        group="self-check", at={"structure": structure, "kind": "exact"},
    )  # fmt: skip


def _anisotropic(structure: str, kind: str, expected: study.Expected) -> study.Claim:
    return claim(
        f"anisotropic-{structure}" if kind == "exact" else f"anisotropic-{structure}-{kind}",
        page("no theorem covers it", "claim 14"),
        study.Inequality("anisotropy", "greater", LEFT, centre="geometric mean"),
        f"A linear step at η = 1/ᾱ with the {structure} {kind} Fisher leaves more of a residual than finite width does.",
        "‖M − ᾱI‖_F/‖ᾱI‖_F with ᾱ = tr M/R, the share left of a residual of random direction; smallest over the widths.",
        expected, group="exploration", at={"structure": structure, "kind": kind, "outputs": (0, 1)},
        estimate=study.least_by_seed, bound_from=LEFT_FROM,
    )  # fmt: skip


RESPONSE = experiment(
    _points,
    name="response",
    measure=_measure,
    varies=("initialisation", "draws"),
    claims=_claims,
    seconds=seconds(0.03, 0.5),
)
