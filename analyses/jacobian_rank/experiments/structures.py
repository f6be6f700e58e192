"""What approximations of the Fisher matrix leave of full rank, of stability and of the rate, on networks with several layers."""

from functools import partial
from itertools import product
from math import log10

import numpy as np
import torch

import curvlab
from analyses.claims import claim
from analyses.jacobian_rank.config import Config
from analyses.jacobian_rank.descent import DIVERGED, descend, watch
from analyses.jacobian_rank.networks import TRAINED, network_setting
from analyses.jacobian_rank.points import PAPER, experiment, page, worst_decade_by_seed
from analyses.specs import classifies_nodes
from curvlab import study, theory
from curvlab.fisher import make
from curvlab.nn import linearize

STEPS = 5
NEAR = 0.1
"""Distance from the linear prediction, over the latter's move, up to which outputs count as following it."""
COUPLED = ("full", "block-diagonal", "block-tridiagonal")
"""Structures that couple all parameters of a layer, or more, exactly."""
TOO_FAR = ("unit-wise", "diagonal", "component-wise", "kfac", "ekfac")
"""Structures whose steps an earlier run found to move too far for J to stay."""
ON = "of an MLP, a convolutional and a residual network"


def _points(config: Config) -> list[study.Point]:
    if classifies_nodes(config.problem):
        return []
    at = {"width": config.swept_widths[0], "activation": config.activation[0]}
    pairs = product(TRAINED, config.structures)
    return [{**at, "network": network, "structure": structure} for network, structure in pairs]


def _measure(cell: study.Cell, context: study.Context[Config]) -> study.Observations:
    setting = network_setting(cell, context.config)
    problem, structure = setting.problem, make(str(cell["structure"]))
    structure.update(curvlab.sqrt_fisher(problem.model, problem.loss, *problem.train))
    response = structure.response(setting.jacobian, 0.0)
    tolerance = study.round_off(setting.jacobian.R, structure.condition_number(), response.dtype)
    response = (response + response.T) / 2
    values = torch.linalg.eigvalsh(response)
    eta = 1 / float(values[-1])
    path, seen = watch(setting, structure, eta, STEPS)
    descended = descend(setting, setting.gradient(), 1 / float(setting.eigenvalues[-1]), STEPS)
    squared, by_descent = (setting.squared_residuals(run) for run in (path, descended))
    linear = theory.predict_train(
        path[0], setting.targets.numpy(force=True), response.numpy(force=True), eta, range(len(path))
    )
    step = descend(setting, setting.natural(make(structure.key)), eta, 1, linearize(problem.model))
    diverged = squared[-1] > DIVERGED**2 * squared[0]
    status = {"status": f"diverged at step {len(path) - 1}"} if diverged else {}
    missing = len(values) - int(torch.linalg.matrix_rank(response, hermitian=True))
    distance = np.linalg.norm(path[-1] - linear[-1]) / np.linalg.norm(linear[-1] - linear[0])
    error = np.linalg.norm(step[1] - linear[1]) / np.linalg.norm(linear[1] - linear[0])
    rows = [
        study.observed("missing", missing, tolerance=0.0),
        study.observed("condition", 1 / (eta * float(values.abs().min()))),
        study.observed("log_gain", float(np.log10(squared[-1] / by_descent[-1])), **status),
        study.observed("lost", max(one.deficiency for one in seen), tolerance=0.0),
        study.observed("distance", float(distance), **status),
        study.observed("linear_error", float(error), tolerance=tolerance),
        study.observed("change_share", setting.change_share(seen)),
    ]
    if setting.full_rank:
        rows.append(study.observed("constant", setting.stability_constant(seen)))
    return rows


def _expected(structure: str) -> tuple[study.Expected, study.Expected]:
    """Whether the outputs follow the linear prediction, and whether the step is faster than gradient descent."""
    if_still = "It holds where J hardly changes; the change is measured beside it."
    conditioned = "Its response is better conditioned than the kernel"
    if structure in TOO_FAR:
        moves = f"{conditioned}, but an earlier run found that it moves too far for J to stay."
        return study.refuted(if_still), study.refuted(moves)
    if structure in COUPLED:
        return study.undecided(if_still), study.supported(f"{conditioned}.")
    return study.undecided(if_still), study.undecided("No theorem covers it.")


def _claims_of(structure: str) -> list[study.Claim]:
    row = partial(claim, at={"structure": structure})
    linear, faster = _expected(structure)
    linear_limit = page(f"{PAPER}, theorem 1 in the linear limit", "claim 4, for approximations")
    return [
        row(f"response-rank-{structure}", f"{PAPER}, condition 1, for approximations (derived)", study.Identity("missing"),
            f"The {structure} step can move the outputs {ON} in every direction.",
            "Dimensions missing in the rank of J F⁺ Jᵀ.",
            study.supported("F⁺ is positive on the range of Jᵀ.")),
        row(f"kept-{structure}", f"{PAPER}, conditions 1 and 2, for approximations (derived)", study.Identity("lost"),
            f"The Jacobian {ON} keeps full row rank along {structure} steps.",
            f"Share of the rows missing in the rank of J before and after each of {STEPS} steps at η = 1/λ_max.",
            study.supported("P is far above the number of rows, and nothing drives the steps to where rows depend on each "
                            "other.")),
        row(f"stable-{structure}", page(f"{PAPER}, condition 2, for approximations", "claim 2"),
            study.Inequality("constant", "less", log10(0.5)),
            f"Along {structure} steps the Jacobian {ON} changes as little as condition 2 asks.",
            "log10 of C_emp along the run, the largest of the three networks; condition 2 wants C_emp below ½.",
            study.refuted("√λ_min(G) is small against ‖J‖, and the networks are narrow."), estimate=worst_decade_by_seed),
        row(f"linearised-{structure}", linear_limit, study.Identity("linear_error"),
            f"On the linearised network a {structure} step takes the residual r to (I − ηM) r.",
            "Distance of the outputs from it after a step at η = 1/λ_max(M), over the length of the move.",
            study.supported("M = J F⁺ Jᵀ/N, and J does not change.")),
        row(f"linear-{structure}", linear_limit, study.Inequality("distance", "less", log10(NEAR)),
            f"The outputs {ON} follow the linear prediction of the {structure} response, r ← (I − ηM) r.",
            f"log10 of the distance of the outputs from it after {STEPS} steps at η = 1/λ_max(M), or where the run diverges, "
            "over the length of its move; the largest of the three networks.",
            linear, estimate=worst_decade_by_seed),
        row(f"faster-{structure}", page(f"{PAPER}, rates", "claim 6, for approximations"),
            study.Inequality("log_gain", "less", 0.0),
            f"The {structure} step contracts the residual {ON} faster than gradient descent, each at its 1/λ_max.",
            f"log10 of what {STEPS} steps leave of ‖r‖², less that of gradient descent, the largest of the three.",
            faster, estimate=study.worst_by_seed),
    ]  # fmt: skip


STRUCTURES = experiment(
    _points,
    name="structures",
    measure=_measure,
    claims=lambda config: [one for structure in config.structures for one in _claims_of(structure)],
    seconds=0.12,
)
