"""Quadratics with alike and unlike blocks: steps of every method (claim 8)."""

from functools import partial

import numpy as np
import pandas as pd

from analyses.block_structure import quadratics
from analyses.block_structure.config import Config
from analyses.block_structure.points import ADAM, DERIVED, MINI, page, quotient
from analyses.block_structure.quadratics import ALIKE, METHODS, MIXED, UNLIKE
from analyses.claims import claim
from curvlab.study import (
    Cell,
    Claim,
    Context,
    Expected,
    Experiment,
    Identity,
    Inequality,
    Observations,
    difference_by_seed,
    observed,
    refuted,
    stream,
    supported,
    undecided,
)  # fmt: skip
from curvlab.study.claims import Group

TIMES_FEWER = 0.1
"""Far fewer steps: a tenth."""


def measure(cell: Cell, context: Context[Config]) -> Observations:  # noqa: ARG001
    """Return the steps of every method on one quadratic; at a seed the start has the same modes on all of them."""
    H, x = quadratics.quadratic(str(cell["spectra"]), np.random.default_rng(stream(int(cell["seed"]), "quadratic")))
    return [observed("steps", quadratics.steps(method, H, x), method=method) for method in METHODS]


_over = partial(quotient, ["spectra", "method"])
"""The estimate by the steps of a method on some spectra over those of another on others."""


def _same(table: pd.DataFrame) -> pd.DataFrame:
    return difference_by_seed(table[table["method"] == "gd"], "spectra", UNLIKE, ALIKE).assign(tolerance=1.0)


def _fewer(
    id_: str,
    source: str,
    first: tuple[str, str],
    second: tuple[str, str],
    statement: str,
    expected: Expected,
    group: Group,
) -> Claim:
    return claim(
        id_, source, Inequality("steps", "less", TIMES_FEWER, centre="geometric mean"), statement,
        "Ratio of steps to a loss of 1e-6 of that at the start, both tuned.", expected, group=group, estimate=_over(first, second),
        bound_from="a tenth, fixed beforehand",
    )  # fmt: skip


CLAIMS = [
    claim("quadratic-gd", page(ADAM, 8), Identity("steps", coarsest=10.0),
          "Gradient descent takes the same number of steps on alike and unlike blocks.",
          "Difference of the steps to a loss of 1e-6 of that at the start, at 2/(λ_max + λ_min).",
          supported("It depends on the nine eigenvalues alone."), group="self-check", estimate=_same),
    _fewer("quadratic-blocks", page(DERIVED, 8), (UNLIKE, "block-gd"), (ALIKE, "block-gd"),
           "With the best rate in each block, gradient descent takes less than a tenth of the steps on unlike blocks.",
           supported("κ_b is at most 3 against 4998."), "derived"),
    _fewer("quadratic-adam", page(ADAM, 8), (UNLIKE, "adam"), (UNLIKE, "gd"),
           "On unlike blocks Adam takes less than a tenth of the steps of gradient descent.",
           supported("Published for a fixed second moment; here it moves."), "paper"),
    _fewer("quadratic-adam-fixed", page(ADAM, 8), (UNLIKE, "adam-fixed"), (UNLIKE, "gd"),
           "On unlike blocks Adam with the second moment of the first gradient does, too.",
           supported("Published."), "paper"),
    _fewer("quadratic-adam-mini", page(MINI, 8), (UNLIKE, "adam-mini"), (UNLIKE, "gd"),
           "On unlike blocks Adam-mini, with one second moment a block, does, too.",
           supported("It is gradient descent with a rate a block."), "paper"),
    _fewer("quadratic-adam-alike", page(ADAM, 8), (ALIKE, "adam"), (ALIKE, "gd"),
           "On alike blocks Adam takes less than a tenth of the steps of gradient descent.",
           refuted("Published: without heterogeneity Adam does not win."), "paper"),
    _fewer("quadratic-mixed", page(DERIVED, 8), (UNLIKE, "adam"), (MIXED, "adam"),
           "Where a rotation mixes unlike blocks, Adam loses a factor of ten at least.",
           supported("The coordinates are no longer those of the blocks."), "derived"),
    claim("quadratic-adam-against-blocks", page(ADAM, 8), Inequality("steps", "less", 1.0, centre="geometric mean"),
          "On unlike blocks Adam takes fewer steps than gradient descent with the best rate in each block.",
          "Ratio of steps, both tuned.", undecided("A rate a coordinate against a rate a block."), group="exploration",
          estimate=_over((UNLIKE, "adam"), (UNLIKE, "block-gd")), bound_from="no difference"),
    claim("quadratic-newton", page(DERIVED, 8), Identity("steps", coarsest=10.0),
          "Steps with the inverse of every block, as K-FAC-like methods take them, need one step where blocks are not mixed.",
          "Steps less one.", supported("The blocks are all there is."), group="self-check",
          estimate=lambda table: table[(table["method"] == "block-newton") & (table["spectra"] != MIXED)].assign(
              value=lambda rows: rows["value"] - 1, tolerance=0.0)),
]  # fmt: skip

QUADRATICS: Experiment[Config] = Experiment(
    name="quadratics",
    cells=[{"spectra": spectra} for spectra in (UNLIKE, ALIKE, MIXED)],
    measure=measure,
    varies=("data",),
    claims=CLAIMS,
    seconds=0.2,
)
