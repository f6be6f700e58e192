"""Training with first-order methods: sharpening, the edge and the loss there (claims 3 to 6, 11 and 12)."""

import itertools
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from analyses.claims import claim
from analyses.edge_of_stability.config import Config
from analyses.edge_of_stability.descent import TrackedDescent, edge_of
from analyses.edge_of_stability.optimisers import Optimiser, adam, frozen, momentum
from analyses.edge_of_stability.points import HOVERING, HOVERS, PAPER, memory, page, points, settled
from analyses.edge_of_stability.setting import Setting, setting_of
from analyses.edge_of_stability.windows import SETTLING
from curvlab import study

NAMES = {
    "gd": "gradient descent",
    "heavy-ball": "heavy ball",
    "nesterov": "Nesterov's momentum",
    "adam": "Adam",
    "adam-frozen": "gradient descent with Adam's preconditioner frozen",
}
WARM_UP = 10
"""The share of the steps after which Adam's preconditioner is frozen, as a divisor."""
PLATEAU_SHARE = 4
"""The share of the steps at the end over which SGD's sharpness is averaged, as a divisor."""
FINE = 5
"""Measurements in the first interval between two others, so that a run that starts near its threshold is seen below it."""
BEYOND = ("adam", "adam-frozen")
"""Optimisers that the paper does not have."""
FOUND = "The paper finds it on CIFAR-10."


def _runs(config: Config) -> list[tuple[str, float]]:
    """Optimisers on the full batch with their step sizes."""
    etas = (config.etas, config.heavy_ball, config.nesterov, config.adam, config.adam)
    return [(optimiser, eta) for optimiser, own in zip(NAMES, etas, strict=True) for eta in own]


def _points(config: Config) -> list[study.Point]:
    return points(config, [{"optimiser": optimiser, "eta": eta} for optimiser, eta in _runs(config)])


def optimiser_of(cell: study.Cell, config: Config, setting: Setting, model: nn.Module) -> Optimiser:
    """Return the optimiser that a cell names."""
    name, eta = str(cell["optimiser"]), float(cell["eta"])
    if name in ("gd", "sgd"):
        return momentum(model, "gd", eta)
    if name in ("heavy-ball", "nesterov"):
        return momentum(model, name, eta, config.beta)
    live = adam(model, eta)
    if name == "adam":
        return live
    for _ in range(config.steps // WARM_UP):
        setting.gradient(model)
        live.step()
    return frozen(model, live.preconditioner, 0.0, eta)


def batch_of(setting: Setting, size: int, seed: int, step: int) -> Tensor:
    """Samples of a step of SGD, a shuffled epoch cut into batches."""
    count = len(setting.problem.train[0])
    in_epoch = -(-count // size)
    epoch, position = divmod(step, in_epoch)
    order = torch.randperm(count, generator=study.generator(seed, "batches", epoch))
    return order[position * size : (position + 1) * size].to(setting.problem.train[0].device)


def _measure(cell: study.Cell, context: study.Context[Config]) -> study.Observations:
    config = context.config
    setting = setting_of(cell, config)
    model = setting.network()
    optimiser = optimiser_of(cell, config, setting, model)
    options: dict[str, Any] = {}
    if "batch" in cell.coordinates:
        options["batches"] = partial(batch_of, setting, int(cell["batch"]), int(cell["seed"]))
    measured = {*range(0, config.every, max(1, config.every // FINE)), *config.measured()}
    process = TrackedDescent(model, setting, optimiser, measured, config.top, **options)
    edge = edge_of(process, config.steps, checkpoint=context.checkpoint)
    last = edge.sharpness[-max(1, len(edge.sharpness) // PLATEAU_SHARE) :]
    return [
        *edge.rows(),
        study.observed("late_sharpness", float(last.mean())),
        study.observed("late_share", edge.late_share),
    ]


def _of_run(optimiser: str, eta: float) -> list[study.Claim]:
    """Claims on runs of one optimiser, all but the first on those that reach their threshold."""
    name, what = f"{optimiser}-{eta:g}", f"{NAMES[optimiser]} at η = {eta:g}"
    at = {"optimiser": optimiser, "eta": eta}
    survives = f"survives-{name}"
    beyond = optimiser in BEYOND
    source = page(f"claim {13 if beyond else 4}")
    group = "derived" if beyond else "paper"
    expected = study.undecided(FOUND) if beyond else study.supported(FOUND)
    hovers = (
        study.undecided("Its threshold is derived.")
        if beyond
        else settled("The README run stays 1.5 to 6.5 % above it.")
    )
    return [
        claim(f"sharpening-{name}", page("claim 3"), study.Inequality("trend", "greater", 0.5, centre="mean"),
              f"Below its threshold, {what} sharpens.",
              "Kendall's τ of the sharpness with the step, over the measurements before the crossing.",
              expected, group=group, at=at),
        claim(survives, source, study.Share("survived", "greater", 0.5),
              f"Having reached its threshold, {what} does not diverge in most runs.",
              "Runs that end with a loss below a hundred times the first.",
              expected, group=group, at=at),
        claim(f"edge-{name}", source, HOVERS,
              f"Having reached its threshold, {what} hovers there.",
              HOVERING, hovers, group=group, at=at, given=survives),
        claim(f"above-{name}", source, study.Inequality("plateau_ratio", "greater", 1.0, centre="geometric mean"),
              f"The sharpness of {what} hovers above the threshold.",
              HOVERING,
              study.undecided("The paper says at it or just above; by optimiser and loss is left open.", explored=12),
              group="exploration", at=at, given=survives, bound_from="2/η"),
    ]  # fmt: skip


def _of_gradient_descent(config: Config) -> list[study.Claim]:
    """Claims on its runs at all step sizes that reach their threshold."""
    at = {"optimiser": "gd"}
    paper: dict[str, Any] = {"group": "paper", "at": at}
    edge = f"from {SETTLING} steps after the crossing on"
    return [
        claim("loss-monotone-below", page("claim 6"), study.Always("increase_before", "less", 0.0),
              "Below the threshold the loss of gradient descent falls at every step.",
              "Share of steps with increasing loss up to the last measurement before the first crossing, in every run.",
              study.supported("A quadratic with curvature below 2/η descends."), **paper),
        claim("loss-rises-at-edge", page("claim 6"), study.Inequality("increase_after", "greater", 0.1, centre="mean"),
              "At the edge the loss of gradient descent is not monotone: it rises in more than a tenth of the steps.",
              f"Share of steps with increasing loss {edge}, the mean over step sizes.",
              study.supported(FOUND), **paper),
        claim("loss-falls-long", page("claim 6"), study.Inequality("long_change", "less", 1.0, centre="geometric mean"),
              "At the edge the loss of gradient descent falls on long time scales.",
              f"Mean loss in the second half of the time at the edge, {edge}, over that in the first; the mean over step sizes.",
              study.supported(FOUND), bound_from="1 as a ratio", **paper),
        claim("descent-lemma", page("claim 12"), study.Inequality("lemma_broken", "greater", 1 / 3, centre="mean"),
              "At the edge the descent lemma's decrease, η‖g‖²/2 a step, is missed in more than a third of the steps.",
              f"Share of steps with L(k+1) > L(k) − η‖g‖²/2 {edge}, the mean over step sizes.",
              study.supported(FOUND), **paper),
        claim("alignment-at-edge", f"{PAPER} (beyond the paper)", study.Inequality("step_share", "greater", 0.5, centre="mean"),
              f"At the edge the step of gradient descent lies mostly in the top {config.top} eigenspace of the Hessian.",
              f"Share of the step's squared norm there, the mean over measurements {edge}.",
              study.undecided("It oscillates along the top eigenvector, and that is what the gradient is made of."),
              group="exploration", at=at, bound_from="most of it"),
        claim("plateaus-inverse", page("claim 5"), study.Equivalence("plateau_sharpness", -1.0, 0.1, centre="mean"),
              "Plateaus of the sharpness scale as 1/η.",
              f"Slope of the log of the sharpness {edge} on log η, over the step sizes.",
              settled("Each sits at 2/η."), **paper,
              estimate=partial(study.slope_by_seed, against="eta"),
              assumptions=study.needs_several("eta", "step sizes (--etas)")),
    ]  # fmt: skip


SGD_BATCH = claim(
    "sgd-batch", page("claim 11"), study.Inequality("late_sharpness", "greater", 0.0, centre="mean"),
    "SGD settles at lower sharpness the smaller the batch.",
    f"Slope of the log of the sharpness over the last 1/{PLATEAU_SHARE} of the run on log batch size.",
    study.supported("Noise in the gradient acts against sharp directions."), group="paper", bound_from="no dependence",
    estimate=partial(study.slope_by_seed, against="batch"),
    assumptions=study.needs_several("batch", "batch sizes (--batch-size)"),
)  # fmt: skip


def _claims(config: Config) -> list[study.Claim]:
    of_runs = itertools.chain.from_iterable(itertools.starmap(_of_run, _runs(config)))
    return [*of_runs, *_of_gradient_descent(config)]


TRAINING: study.Experiment[Config] = study.Experiment(
    name="training",
    cells=_points,
    measure=_measure,
    varies=("initialisation",),
    claims=_claims,
    seconds=2.0,
    memory=memory,
)
BATCHES: study.Experiment[Config] = study.Experiment(
    name="batches",
    cells=lambda config: points(
        config, [{"optimiser": "sgd", "eta": config.middle, "batch": size} for size in config.batch_size]
    ),
    measure=_measure,
    varies=("initialisation", "batches"),
    claims=[SGD_BATCH],
    seconds=2.0,
    memory=memory,
)
