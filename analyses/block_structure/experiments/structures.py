"""What every structure says of a trained network: error of the matrix, and of the step (claims 1 and 4)."""

from typing import Any

import torch

from analyses.block_structure.config import GGN, Config
from analyses.block_structure.points import DERIVED, correlation, formed, page, too_few
from analyses.block_structure.setting import problem_of, trained
from analyses.block_structure.steps import best, cosine, full_solver
from analyses.claims import claim
from curvlab import spectrum
from curvlab.fisher import make
from curvlab.study import Cell, Claim, Context, Experiment, Inequality, Observations, among, observed, undecided


def measure(cell: Cell, context: Context[Config]) -> Observations:
    """Return errors of every structure's matrix, and what its best step does, beside the Gauss–Newton matrix'."""
    config, seed = context.config, int(cell["seed"])
    point = trained(config, problem_of(config, str(cell["problem"]), seed), seed)
    exact = point.dense(GGN)
    largest = float(spectrum.eigenpairs(exact, 1).values[0])
    full = best(point, full_solver(exact, point.gradient), largest)
    rows = []
    for name in config.structures:
        fitted = make(name).update(point.rows)

        def solve(damping: float, fitted: Any = fitted) -> torch.Tensor:
            solved: torch.Tensor = fitted.solve(point.gradient, damping)
            return solved

        kept = best(point, solve, largest)
        error = float((fitted.to_dense() - exact.matrix).norm() / exact.matrix.norm())
        rows += [
            observed("matrix_error", error, structure=name),
            observed("step_cosine", cosine(full.step, kept.step), structure=name),
            observed("step_gain", kept.gain / full.gain, structure=name),
        ]
    return rows


def _claims(config: Config) -> list[Claim]:
    others = tuple(name for name in config.structures if name != "full")
    apart = "Structures but the full one; Gauss–Newton matrix after training, each step at its best damping."
    return [
        claim(f"structures-{what}", page(DERIVED, 4), Inequality(("matrix_error", quantity), "less", -0.5, centre="mean"),
              f"The farther a structure's matrix is from the Gauss–Newton matrix, {words}.",
              f"Rank correlation of the relative Frobenius distance with it. {apart}",
              undecided("No theorem leads from the matrix to the step."), group="exploration",
              estimate=among(correlation("matrix_error", quantity, "structure"), structure=others),
              assumptions=lambda table: too_few(("structure",))(table[table["structure"].isin(others)]))
        for what, quantity, words in (
            ("cosine", "step_cosine", "the farther is its step from the full one"),
            ("gain", "step_gain", "the less does its step lower the loss"),
        )
    ]  # fmt: skip


STRUCTURE: Experiment[Config] = Experiment(
    name="structures",
    cells=formed,
    measure=measure,
    varies=("initialisation", "batches"),
    claims=_claims,
    seconds=2.5,
    memory=1.5e9,
)
