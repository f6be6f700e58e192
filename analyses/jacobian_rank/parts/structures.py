"""What approximations of the Fisher matrix leave of full rank, of stability and of the rate, on networks with several layers."""

from __future__ import annotations

import copy
from functools import partial
from math import log10

import numpy as np
import pandas as pd
import torch

import curvlab
from analyses.assembly import classifies_nodes
from analyses.estimates import identities, worst_by_seed
from analyses.jacobian_rank.config import Config
from analyses.jacobian_rank.descent import DIVERGED, descend, follow, gradient, inspect, natural, squared_residuals
from analyses.jacobian_rank.networks import TRAINED, network_setting
from analyses.jacobian_rank.part import PAPER, Part, cells_of
from analyses.part import TOLERANCE_FACTOR, Expectation, Observations, where
from curvlab import theory
from curvlab.fisher import make
from curvlab.nn import linearize
from curvlab.study import Cell, Claim, Identity, Inequality

NAME = "structures"
STEPS = 5
NEEDS_SIGMA = "layer-wise"
"""A family rather than one structure: the members that have a name are here."""
NEAR = 0.1
"""Distance from the linear prediction, over the latter's move, up to which outputs count as following it."""
TOO_FAR = (
    "Its response is better conditioned than the kernel, but an earlier run found that it moves too far for J to stay."
)
FASTER: dict[str, tuple[Expectation, str]] = {
    "full": ("supported", "Its response is better conditioned than the kernel."),
    **dict.fromkeys(("unit-wise", "diagonal", "kfac", "ekfac"), ("refuted", TOO_FAR)),
}
"""Whether a structure is expected to be faster than gradient descent, and why; others as the full structure."""
ON = "of an MLP, a convolutional and a residual network"


def _structures(config: Config) -> list[str]:
    return [structure for structure in config.structures if structure != NEEDS_SIGMA]


def _cells(config: Config) -> list[Cell]:
    if classifies_nodes(config.problem):
        return []
    at = {"width": config.swept_widths[0], "activation": config.activation[0]}
    points = [
        {**at, "network": network, "structure": structure} for network in TRAINED for structure in _structures(config)
    ]
    return cells_of(NAME, config, points)


def _measure(cell: Cell, config: Config) -> Observations:
    setting = network_setting(cell, config)
    problem, structure = setting.problem, make(str(cell["structure"]))
    structure.update(curvlab.sqrt_fisher(problem.model, problem.loss, *problem.train))
    response = structure.response(setting.jacobian, 0.0)
    precision = setting.jacobian.R * float(torch.finfo(response.dtype).eps) * structure.condition_number()
    response = (response + response.T) / 2
    values = torch.linalg.eigvalsh(response)
    eta = 1 / float(values[-1])
    path, points = follow(
        copy.deepcopy(problem.model),
        setting,
        structure,
        natural(structure, setting),
        eta,
        STEPS,
        partial(inspect, setting=setting),
    )
    descended = descend(
        copy.deepcopy(problem.model), setting, gradient(setting), 1 / float(setting.eigenvalues[-1]), STEPS
    )
    squared, by_descent = (squared_residuals(run, setting) for run in (path, descended))
    linear = theory.predict_train(
        path[0], setting.targets.numpy(force=True), response.numpy(force=True), eta, range(len(path))
    )
    step = descend(linearize(problem.model), setting, natural(make(structure.key), setting), eta, 1)
    move = float(np.linalg.norm(linear[1] - linear[0]))
    diverged = squared[-1] > DIVERGED**2 * squared[0]
    status = {"status": f"diverged at step {len(path) - 1}"} if diverged else {}
    rows: list[dict[str, object]] = [
        {
            "quantity": "missing",
            "value": len(values) - int(torch.linalg.matrix_rank(response, hermitian=True)),
            "tolerance": 0.0,
        },
        {"quantity": "condition", "value": 1 / (eta * float(values.abs().min()))},
        {"quantity": "log_gain", "value": float(np.log10(squared[-1] / by_descent[-1])), **status},
        {"quantity": "lost", "value": max(point.deficiency for point in points), "tolerance": 0.0},
        {
            "quantity": "distance",
            "value": float(np.linalg.norm(path[-1] - linear[-1]) / np.linalg.norm(linear[-1] - linear[0])),
            **status,
        },
        {
            "quantity": "linear_error",
            "value": float(np.linalg.norm(step[1] - linear[1])) / move,
            "tolerance": TOLERANCE_FACTOR * precision,
        },
        {
            "quantity": "change_share",
            "value": max(point.change_frobenius for point in points) / float(setting.gram.trace().sqrt()),
        },
    ]
    if setting.full_rank:
        C = theory.stability_constant(max(point.change for point in points), float(setting.eigenvalues[0]))
        rows.append({"quantity": "constant", "value": C})
    return rows


def worst_decade_by_seed(table: pd.DataFrame) -> pd.DataFrame:
    """Estimate by log10 of the largest of a seed's observations, for values that spread over decades."""
    return worst_by_seed(table.assign(value=np.log10(table["value"])))


def _claims(config: Config) -> list[Claim]:
    return [claim for structure in _structures(config) for claim in _claims_of(structure)]


def _claims_of(structure: str) -> list[Claim]:
    at = where(NAME, structure=structure)
    faster, reason = FASTER.get(structure, FASTER["full"])
    return [
        Claim(
            id=f"response-rank-{structure}",
            statement=f"The {structure} step can move the outputs {ON} in every direction.",
            source=f"{PAPER}, condition 1, for approximations (derived)",
            measured="Dimensions missing in the rank of J F⁺ Jᵀ.",
            rule=Identity(),
            estimate=identities,
            expected="supported",
            reason="F⁺ is positive on the range of Jᵀ.",
            needs=at,
            quantities=("missing",),
        ),
        Claim(
            id=f"kept-{structure}",
            statement=f"The Jacobian {ON} keeps full row rank along {structure} steps.",
            source=f"{PAPER}, conditions 1 and 2, for approximations (derived)",
            measured=f"Share of the rows missing in the rank of J before and after each of {STEPS} steps at η = 1/λ_max.",
            rule=Identity(),
            estimate=identities,
            expected="supported",
            reason="P is far above the number of rows, and nothing drives the steps to where rows depend on each other.",
            needs=at,
            quantities=("lost",),
        ),
        Claim(
            id=f"stable-{structure}",
            statement=f"Along {structure} steps the Jacobian {ON} changes as little as condition 2 asks.",
            source=f"{PAPER}, condition 2, for approximations (theory file, claim 2)",
            measured="log10 of C_emp along the run, the largest of the three networks; condition 2 wants C_emp below ½.",
            rule=Inequality(log10(0.5), "less"),
            estimate=worst_decade_by_seed,
            expected="refuted",
            reason="√λ_min(G) is small against ‖J‖, and the networks are narrow.",
            needs=at,
            quantities=("constant",),
        ),
        Claim(
            id=f"linearised-{structure}",
            statement=f"On the linearised network a {structure} step takes the residual r to (I − ηM) r.",
            source=f"{PAPER}, theorem 1 in the linear limit (theory file, claim 4, for approximations)",
            measured="Distance of the outputs from it after a step at η = 1/λ_max(M), over the length of the move.",
            rule=Identity(),
            estimate=identities,
            expected="supported",
            reason="M = J F⁺ Jᵀ/N, and J does not change.",
            needs=at,
            quantities=("linear_error",),
        ),
        Claim(
            id=f"linear-{structure}",
            statement=f"The outputs {ON} follow the linear prediction of the {structure} response, r ← (I − ηM) r.",
            source=f"{PAPER}, theorem 1 in the linear limit (theory file, claim 4, for approximations)",
            measured=f"log10 of the distance of the outputs from it after {STEPS} steps at η = 1/λ_max(M), or where the run "
            "diverges, over the length of its move; the largest of the three networks.",
            rule=Inequality(log10(NEAR), "less"),
            estimate=worst_decade_by_seed,
            expected="refuted" if faster == "refuted" else "open",
            reason="It holds where J hardly changes; the change is measured beside it.",
            needs=at,
            quantities=("distance",),
        ),
        Claim(
            id=f"faster-{structure}",
            statement=f"The {structure} step contracts the residual {ON} faster than gradient descent, each at its 1/λ_max.",
            source=f"{PAPER}, rates (theory file, claim 6, for approximations)",
            measured=f"log10 of what {STEPS} steps leave of ‖r‖², less that of gradient descent, the largest of the three.",
            rule=Inequality(0.0, "less"),
            estimate=worst_by_seed,
            expected=faster,
            reason=reason,
            needs=at,
            quantities=("log_gain",),
        ),
    ]


PART = Part(NAME, _cells, _measure, _claims, seconds=lambda _: 0.12)
