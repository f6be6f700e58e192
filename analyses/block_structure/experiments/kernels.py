"""The row side: maps from kernels of layers, and what undamped steps do (claims 3 and 4)."""

from dataclasses import replace

import numpy as np
import torch

import curvlab
from analyses.block_structure.config import GGN, Config
from analyses.block_structure.points import DERIVED, formed, nothing, page
from analyses.block_structure.setting import Point, problem_of, terms_of_a_sample, trained
from analyses.block_structure.steps import cosine
from analyses.claims import claim
from analyses.specs import classifies_nodes
from curvlab.fisher import BlockDiagonal, Full
from curvlab.rows import Rows
from curvlab.rows.rows import gram
from curvlab.spectrum import by_layer
from curvlab.spectrum.blocks import dense_block_map
from curvlab.study import (
    Cell,
    Context,
    Experiment,
    Identity,
    Inequality,
    Observations,
    generator,
    observed,
    round_off,
    supported,
    undecided,
)  # fmt: skip
from curvlab.theory import block_structure as theory

TERMS = 16
"""Loss terms of the map."""
SAMPLES = 8
"""Samples of the undamped steps, each a row: single terms at the first position say nothing of queries and keys."""
SHORT = "a layer has a kernel short of rank"
"""Why the undamped limit says nothing."""


def measure(cell: Cell, context: Context[Config]) -> Observations:
    """Return the map from kernels against that by products, what of it alignment explains, and undamped steps."""
    config, seed = context.config, int(cell["seed"])
    problem = problem_of(config, str(cell["problem"]), seed)
    whole = trained(config, problem, seed)
    point = _fewer(whole, problem.name, TERMS // terms_of_a_sample(whole.targets))
    stacked = _kernels(point.rows)
    mass = theory.kernel_mass(stacked)
    share, norms = theory.off_block_share(mass), np.sqrt(np.diag(mass))
    dense = dense_block_map(point.operator(GGN).to_dense(), by_layer(point.space)).share
    aligned = theory.aligned_share(norms)
    tolerance = round_off(point.rows.R, 1 / (1 - share), point.rows.dtype)
    rows = [
        observed("share_error", share - dense, tolerance=tolerance),
        observed("aligned", share / aligned),
        observed("equal_norms", aligned / (1 - 1 / len(norms))),
    ]
    few = _fewer(_distinct(whole, problem.name), problem.name, SAMPLES)
    per_sample = curvlab.sqrt_fisher(few.model, few.loss, few.inputs, few.targets, "empirical", rows="sample")
    return rows + _undamped(per_sample, seed)


def _fewer(point: Point, name: str, samples: int) -> Point:
    """The same network on fewer samples; all nodes of a graph."""
    count = len(point.inputs) if classifies_nodes(name) else max(1, samples)
    return replace(point, inputs=point.inputs[:count], targets=point.targets[:count])


def _distinct(point: Point, name: str) -> Point:
    """The same network on samples no two of which have the same inputs; all nodes of a graph."""
    if classifies_nodes(name):
        return point
    _, where = torch.unique(point.inputs, dim=0, return_inverse=True)
    first = [int((where == index).nonzero()[0]) for index in range(int(where.max()) + 1)]
    return replace(point, inputs=point.inputs[first], targets=point.targets[first])


def _kernels(rows: Rows) -> np.ndarray:
    return np.stack([gram([layer], [layer]).double().numpy(force=True) for layer in rows.layers])


def _undamped(rows: Rows, seed: int) -> list[dict[str, object]]:
    """Cosine of undamped steps against the formula, and canonical correlations, of the Fisher matrix of some rows."""
    kernels = _kernels(rows)
    values = np.linalg.eigvalsh(kernels)
    condition = float((values[:, -1] / values[:, 0].clip(min=1e-300)).max())
    if values[:, 0].min() <= 0 or condition > 1e12:
        return [{"quantity": name, "tolerance": 1.0, **nothing(SHORT)} for name in ("cosine_error", "correlation_gap")]
    r = torch.randn(rows.R, dtype=rows.dtype, generator=generator(seed, "residual")).to(rows.device)
    steps = [rows.space.flatten(one.update(rows).lift(r, 0.0)) for one in (Full(), BlockDiagonal())]
    predicted = theory.undamped_cosine(kernels, r.double().numpy(force=True))
    first, second = (layer.dense().double().numpy(force=True) for layer in (rows.layers[0], rows.layers[-1]))
    least = float(theory.canonical_correlations(first, second).min())
    tolerance = round_off(rows.R, condition, rows.dtype)
    return [
        observed("cosine_error", cosine(*steps) - predicted, tolerance=tolerance),
        observed("undamped_cosine", predicted),
        observed("correlation_gap", 1 - least, tolerance=tolerance),
    ]


CLAIMS = [
    claim("row-side", page(DERIVED, 3), Identity("share_error"),
          "The off-block share of layers is 1 − Σ_b ‖K_b‖²/‖Σ_b K_b‖² with the kernels K_b of layers.",
          "Difference to the share of the Gauss–Newton matrix by automatic differentiation, on 16 loss terms after training.",
          supported("‖S_bᵀS_c‖² = ⟨K_b, K_c⟩."), group="self-check"),
    claim("kernels-aligned", page(DERIVED, 3), Inequality("aligned", "greater", 0.5, centre="geometric mean"),
          "More than half of the share that perfectly aligned kernels of the same norms would have is there.",
          "ω over 1 − Σn_b²/(Σn_b)² with the norms n_b of the kernels of layers; Gauss–Newton matrix after training.",
          undecided("Kernels are positive, hence never orthogonal unless their ranges are."), group="derived"),
    claim("undamped-cosine", page(DERIVED, 4), Identity("cosine_error"),
          "Undamped, the full and the block-diagonal step have the cosine B √(rᵀK⁻¹r)/√(Σ_b rᵀK_b⁻¹r).",
          "Difference to the cosine of steps in the parameters, empirical Fisher matrix of 8 samples, random r; layers.",
          supported("Derived, for kernels of full rank."), group="self-check"),
    claim("canonical-correlations", page(DERIVED, 4), Identity("correlation_gap"),
          "Where all kernels have full rank, all canonical correlations of the first and the last layer are 1.",
          "1 minus the least of them, empirical Fisher matrix of 8 samples.", supported("Both ranges are all of the rows'."),
          group="self-check"),
]  # fmt: skip

KERNELS: Experiment[Config] = Experiment(
    name="kernels",
    cells=formed,
    measure=measure,
    varies=("initialisation", "batches", "draws"),
    claims=CLAIMS,
    seconds=1.0,
)
