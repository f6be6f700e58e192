"""Hessian products by central differences of gradients, in three floating-point types (claim 12)."""

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from analyses.block_structure.config import HESSIAN, Config
from analyses.block_structure.differences import Differences
from analyses.block_structure.points import DERIVED, FAILS, formed, page
from analyses.block_structure.setting import Point, problem_of, trained
from analyses.claims import claim
from curvlab.problems import Problem
from curvlab.spectrum import Operator, block_map, by_layer
from curvlab.spectrum.lanczos import quadrature
from curvlab.study import (
    Cell,
    Context,
    Equivalence,
    Experiment,
    Inequality,
    Observations,
    among,
    by_seed,
    generator,
    geometric_by_seed,
    observed,
    slope_by_seed,
    supported,
    undecided,
)  # fmt: skip

EPSILONS = tuple(float(f"{10.0 ** (k / 2):.3g}") for k in range(-16, 1))
"""ε: the length of a step over that of the parameters."""
PUBLISHED = {"float64": 1e-5, "float32": 1e-3, "bfloat16": 1e-1}
"""Best ε by type, near u^{1/3} (recalled)."""
TRUNCATED = (1e-3, 3e-2)
"""Range of ε in which a difference in double precision is cut off, not rounded."""
VECTORS, SIGNS, LANCZOS = 2, 2, 20
"""Random directions of the error, signs a block of the map, and Lanczos steps."""


def measure(cell: Cell, context: Context[Config]) -> Observations:
    """Return the error of products over ε, and at the best of these the off-block share and the largest Ritz value."""
    config, seed = context.config, int(cell["seed"])
    problem = problem_of(config, str(cell["problem"]), seed)
    point = trained(config, problem, seed)
    exact = point.operator(HESSIAN)
    data = (point.inputs, point.targets)
    drawn = torch.randn(VECTORS, exact.size, dtype=exact.dtype, generator=generator(seed, "directions")).to(
        exact.device
    )
    products = exact.matmat(drawn)
    share, top = _share(exact, seed), _top(exact, drawn[0])
    rows: list[dict[str, object]] = []
    for name, published in PUBLISHED.items():
        other = Problem(problem.name, point.model, problem.loss, data, data).to(dtype=getattr(torch, name))
        rounded = Point(other.model, other.loss, *other.train)
        errors = {}
        for epsilon in EPSILONS:
            found = Differences(rounded, epsilon).matmat(drawn)
            errors[epsilon] = float((found - products).norm() / products.norm())
            rows.append(observed("difference_error", errors[epsilon], epsilon=epsilon, arithmetic=name))
        best = min(errors, key=lambda epsilon: errors[epsilon])
        differences = Differences(rounded, best)
        rows += [
            observed("best", float(np.log10(best / published)), arithmetic=name),
            observed("share_change", abs(_share(differences, seed) / share - 1), arithmetic=name),
            observed("top_change", abs(_top(differences, drawn[0]) / top - 1), arithmetic=name),
        ]
    return rows


def _share(operator: Operator, seed: int) -> float:
    """The off-block share of layers, with the same signs for every operator."""
    return block_map(operator, by_layer(operator.space), probes=SIGNS, generator=generator(seed, "signs")).share


def _top(operator: Operator, start: Float[Tensor, " P"]) -> float:
    """The largest Ritz value of some Lanczos steps."""
    return float(quadrature(lambda vector: operator.matmat(vector[None])[0], start, LANCZOS).nodes[-1])


def _slope(table: pd.DataFrame) -> pd.DataFrame:
    """Slope of log error against log ε where differences are cut off."""
    return slope_by_seed(table[table["epsilon"].between(*TRUNCATED)], "epsilon")


CLAIMS = [
    claim("difference-order", page(DERIVED, 12), Equivalence("difference_error", 2.0, 0.25, centre="mean"),
          "In double precision the error of a product by central differences grows like ε² where it is not rounded.",
          "Slope of log error against log ε from 1e-3 to 3e-2, ε relative to the length of the parameters.",
          supported("What a central difference cuts off is of third order."), group="derived",
          estimate=among(_slope, arithmetic="float64")),
    *(claim(f"difference-best-{name}", page(FAILS, 12), Equivalence("best", 0.0, 1.0, centre="mean"),
            f"In {name} the best ε is {epsilon:g} up to a factor of ten.",
            f"log₁₀ of the best of the grid over {epsilon:g}, random directions, ε relative to the length of the parameters.",
            supported("u^{1/3}, where truncation and round-off balance."), group="paper",
            estimate=among(by_seed, arithmetic=name), bound_from="a factor of ten") for name, epsilon in PUBLISHED.items()),
    *(claim(f"difference-{what}-{name}", page(FAILS, 12), Inequality(quantity, "less", 0.05, centre="geometric mean"),
            f"At the best ε, differences in {name} give {words} up to a twentieth.",
            "Relative change against exact products, with the same random vectors.",
            undecided("Errors of single products average out, or do not."), group="paper",
            estimate=among(geometric_by_seed, arithmetic=name))
      for name in ("float32", "bfloat16")
      for what, quantity, words in (
          ("share", "share_change", "the off-block share of layers"),
          ("lanczos", "top_change", "the largest Ritz value of twenty Lanczos steps"))),
]  # fmt: skip

FINITE: Experiment[Config] = Experiment(
    name="differences",
    cells=formed,
    measure=measure,
    varies=("initialisation", "batches", "draws"),
    claims=CLAIMS,
    seconds=2.0,
)
