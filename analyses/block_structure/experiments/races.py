"""Who wins, SGD or Adam, each tuned, on networks of several kinds and widths, and what predicts it (claims 7 and 9)."""

import math

import pandas as pd
import torch
from torch import nn

from analyses.block_structure.config import GGN, HESSIAN, Config
from analyses.block_structure.experiments.curvature import CURVATURE, RACED
from analyses.block_structure.experiments.one_rate import ADAM_MINI, ADAMW, partition_of
from analyses.block_structure.optimiser import AdamMini
from analyses.block_structure.points import ADAM, DERIVED, MINI, START, page, quotient, rank_correlations, too_few
from analyses.block_structure.setting import loss_in_testing, problem_of, train
from analyses.claims import claim
from curvlab.study import Cell, Claim, Context, Experiment, Inequality, Observations, observed, supported, undecided
from curvlab.study.estimates import Estimate

SGD = "sgd"
RATES = {SGD: (0.03, 0.1, 0.3, 1.0, 3.0), ADAMW: (0.001, 0.003, 0.01, 0.03), ADAM_MINI: (0.001, 0.003, 0.01, 0.03)}
"""Learning rates over which a method is tuned, on batches that no judged run has."""
MOMENTUM = 0.9
PREDICTORS = {
    "js": ("the published JS⁰", {"quantity": "distance", "matrix": HESSIAN, "scale": "linear"}),
    "share": ("the off-block share of layers", {"quantity": "share", "matrix": HESSIAN, "partition": "layer"}),
    "anisotropy": ("the anisotropy of the response of layers", {"quantity": "anisotropy", "matrix": GGN}),
    "traces": ("the spread of log traces of tensors", {"quantity": "trace_spread", "matrix": HESSIAN}),
}
"""What may predict the gap: words, and the rows of the curvature experiment at initialisation that it is."""


def measure(cell: Cell, context: Context[Config]) -> Observations:
    """Return the test loss of a method at its best rate, tuned on other batches."""
    config, method = context.config, str(cell["method"])
    tuned = {rate: _run(cell, config, rate, "tuning") for rate in RATES[method]}
    best = min(tuned, key=lambda rate: tuned[rate] if math.isfinite(tuned[rate]) else math.inf)
    return [observed("test_loss", _run(cell, config, best, "batches"), rate=best)]


def _run(cell: Cell, config: Config, rate: float, role: str) -> float:
    seed = int(cell["seed"])
    problem = problem_of(config, str(cell["problem"]), seed, width=int(cell["width"]))
    optimiser = _optimiser(str(cell["method"]), problem.model, rate, seed)
    train(problem, optimiser, range(config.steps), config.batch, seed, role)
    return loss_in_testing(problem)


def _optimiser(method: str, model: nn.Module, rate: float, seed: int) -> torch.optim.Optimizer:
    if method == SGD:
        return torch.optim.SGD(model.parameters(), lr=rate, momentum=MOMENTUM)
    return AdamMini(model, partition_of(method, model, seed), rate)


def _predicts(rows: dict[str, str]) -> Estimate:
    """The estimate by the rank correlation of a predictor with the gap of SGD over Adam, over all networks of a seed."""

    def estimate(table: pd.DataFrame) -> pd.DataFrame:
        losses = table[table["quantity"] == "test_loss"].pivot_table("value", ["seed", "problem", "width"], "method")
        gap = losses[SGD] - losses[ADAMW]
        wanted = table[table["time"] == START]
        for name, value in rows.items():
            wanted = wanted[wanted[name] == value]
        wide = pd.concat([gap, wanted.groupby(["seed", "problem", "width"])["value"].mean()], axis=1).dropna()
        wide.columns = ["gap", "predictor"]
        return rank_correlations(wide, "gap", "predictor")

    return estimate


def _claims(config: Config) -> list[Claim]:
    raced = {"experiment": (CURVATURE.name, "races"), "width": RACED}
    predicting = [
        claim(f"{name}-predicts-gap", page(ADAM if name == "js" else DERIVED, 7),
              Inequality(("test_loss", rows["quantity"]), "greater", 0.5, centre="mean"),
              f"Over networks and widths, {words} at initialisation ranks by how much Adam is ahead of SGD (measured by --races).",
              "Rank correlation with the difference of the test losses, both tuned, over at least eight networks.",
              supported("Published of the distance.") if name == "js" else undecided("A rival on the same footing."),
              group="paper" if name == "js" else "exploration", at=raced, estimate=_predicts(rows),
              assumptions=too_few(("problem", "width"), 8))
        for name, (words, rows) in PREDICTORS.items()
    ]  # fmt: skip
    at = {"problem": config.problem}
    return [
        *predicting,
        claim("sgd-loses", page(ADAM, 7), Inequality("test_loss", "greater", 1.01, centre="geometric mean"),
              "On the problem's network tuned SGD ends with a test loss more than a hundredth above that of tuned AdamW "
              "(measured by --races).", "Ratio of test losses, mean over widths.", supported("Published of transformers."),
              group="paper", at=at, estimate=quotient("method", SGD, ADAMW)),
        claim("adam-mini-tuned", page(MINI, 9), Inequality("test_loss", "less", 1.01, centre="geometric mean"),
              "Both tuned, Adam-mini reaches AdamW's test loss, up to a hundredth (measured by --races).",
              "Ratio of test losses, mean over widths.", supported("Published as equal or better."), group="paper", at=at,
              estimate=quotient("method", ADAM_MINI, ADAMW)),
    ]  # fmt: skip


RACES: Experiment[Config] = Experiment(
    name="races",
    cells=lambda config: [
        {"problem": problem, "width": width, "method": method}
        for problem in config.compared for width in RACED for method in RATES if config.races
    ],
    measure=measure,
    varies=("initialisation", "batches"),
    claims=_claims,
    seconds=6.0,
)  # fmt: skip
