"""What approximations of the Fisher matrix leave of full rank, of stability and of the rate, on networks with several layers."""

from itertools import product
from typing import Any

import numpy as np
import torch

import curvlab
from analyses.claims import claim
from analyses.jacobian_rank.config import Config
from analyses.jacobian_rank.descent import DIVERGED, descend, watch
from analyses.jacobian_rank.networks import TRAINED, UNITS, network_setting
from analyses.jacobian_rank.points import experiment, page
from analyses.specs import classifies_nodes
from curvlab import study, theory
from curvlab.fisher import make
from curvlab.nn import linearize

STEPS = 5
WIDER = 4
"""Hidden units or channels, in those of the other experiments."""
NEAR = 0.1
"""Distance from the linear prediction, over the latter's move, up to which outputs count as following it."""
COUPLED = ("full", "block-diagonal", "block-tridiagonal")
"""Structures that couple all parameters of a layer, or more, exactly."""
IN_PARTS = ("unit-wise", "diagonal", "component-wise", "kfac", "ekfac")
"""Structures of ours that couple the parameters of a layer in parts, or by a product of two factors."""
ON = "of an MLP, a convolutional and a residual network"


def _points(config: Config) -> list[study.Point]:
    if classifies_nodes(config.problem):
        return []
    at = {"width": config.swept_widths[0], "activation": config.activation[0]}
    pairs = product(TRAINED, config.structures)
    return [{**at, "network": name, "units": WIDER * UNITS[name], "structure": structure} for name, structure in pairs]


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
    distance = np.linalg.norm(path[-1] - linear[-1]) / np.linalg.norm(linear[-1] - linear[0])
    error = np.linalg.norm(step[1] - linear[1]) / np.linalg.norm(linear[1] - linear[0])
    rows = [
        study.observed("condition", 1 / (eta * float(values.abs().min()))),
        study.observed("left", float(squared[-1] / by_descent[-1]), **status),
        study.observed("lost", max(one.deficiency for one in seen)),
        study.observed("distance", float(distance), **status),
        study.observed("linear_error", float(error), tolerance=tolerance),
        study.observed("change_share", setting.change_share(seen)),
    ]
    if setting.full_rank:
        rows.append(study.observed("constant", setting.stability_constant(seen)))
    return rows


LINEAR_LIMIT = page("theorem 1 in the linear limit", "claim 4, for approximations")


def _expected(structure: str) -> tuple[study.Expected, study.Expected]:
    """Whether the outputs follow the linear prediction, and whether the step is faster than gradient descent."""
    still = "It holds where J hardly changes; the change is measured beside it."
    conditioned = "Its response is better conditioned than the kernel."
    if structure in COUPLED:
        return study.undecided(still), study.supported(conditioned)
    if structure not in IN_PARTS:
        return study.undecided(still), study.undecided("No theorem covers it.")
    far = "J⁺ alone is the shortest way to a change of the outputs; parameters coupled in parts only go further than J stays."
    return study.refuted(far, explored=12), study.refuted(f"{conditioned} But: {far}", explored=12)


def _claims_of(structure: str) -> list[study.Claim]:
    at: dict[str, Any] = {"group": "exploration", "at": {"structure": structure}, "estimate": study.worst_by_seed}
    linear, faster = _expected(structure)
    return [
        claim(f"linear-{structure}", LINEAR_LIMIT,
              study.Inequality("distance", "less", NEAR, centre="geometric mean"),
              f"The outputs {ON} follow the linear prediction of the {structure} response, r ← (I − ηM) r.",
              f"Distance of the outputs from it after {STEPS} steps at η = 1/λ_max(M), or where the run diverges, over the length "
              "of its move; the largest of the three networks.",
              linear, given="structures-linearised", **at),
        claim(f"faster-{structure}", page("rates", "claim 6, for approximations"),
              study.Inequality("left", "less", 1.0, centre="geometric mean"),
              f"The {structure} step contracts the residual {ON} faster than gradient descent, each at its 1/λ_max.",
              f"What {STEPS} steps leave of ‖r‖², over what gradient descent leaves, the largest of the three.",
              faster, bound_from="1: as fast", **at),
    ]  # fmt: skip


def _claims(config: Config) -> list[study.Claim]:
    return [
        claim("structures-kept", page("conditions 1 and 2", "claims 1 and 2, for approximations"),
              study.Always("lost", "less", 0.0),
              f"The Jacobian {ON} keeps full row rank along the steps of every structure.",
              f"Share of the rows missing in the rank of J before and after each of {STEPS} steps at η = 1/λ_max.",
              study.supported("P is far above the number of rows, and nothing drives steps to where rows depend on each other."),
              group="derived"),
        claim("structures-linearised", LINEAR_LIMIT,
              study.Identity("linear_error"),
              "On the linearised network a step of every structure takes the residual r to (I − ηM) r.",
              "Distance of the outputs from it after a step at η = 1/λ_max(M), over the length of the move.",
              study.supported("M = J F⁺ Jᵀ/N, and J does not change."), group="self-check"),
        *(one for structure in config.structures for one in _claims_of(structure)),
    ]  # fmt: skip


STRUCTURES = experiment(_points, name="structures", measure=_measure, claims=_claims, seconds=0.25)
