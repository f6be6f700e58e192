"""Training with first-order methods: sharpening, the edge and the loss there (claims 3 to 6, 11 and 12)."""

import itertools
from functools import partial

import torch
from torch import Tensor, nn

from analyses.claims import claim
from analyses.edge_of_stability.config import Config
from analyses.edge_of_stability.descent import TrackedDescent, edge_of
from analyses.edge_of_stability.optimisers import Optimiser, adam, frozen, momentum
from analyses.edge_of_stability.points import BAND, PAPER, memory, page, points, reaching
from analyses.edge_of_stability.setting import Setting, setting_of
from analyses.edge_of_stability.windows import LONG
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
BEYOND = ("adam", "adam-frozen")
"""Optimisers that the paper does not have."""
FOUND = study.supported("The paper finds it on CIFAR-10.")


def _runs(config: Config) -> list[tuple[str, float]]:
    """Optimisers on the full batch with their step sizes."""
    etas = (config.etas, config.heavy_ball, config.nesterov, config.adam, config.adam)
    return [(optimiser, eta) for optimiser, own in zip(NAMES, etas, strict=True) for eta in own]


def _points(config: Config) -> list[study.Point]:
    return points(
        config,
        [
            *({"optimiser": optimiser, "eta": eta, "batch": 0} for optimiser, eta in _runs(config)),
            *({"optimiser": "sgd", "eta": config.middle, "batch": batch} for batch in config.batch_size),
        ],
    )


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


def batch_of(setting: Setting, size: int, seed: int, step: int) -> Tensor | None:
    """Samples of a step of SGD, a shuffled epoch cut into batches; all if the size is 0."""
    if not size:
        return None
    count = len(setting.problem.train[0])
    in_epoch = -(-count // size)
    epoch, position = divmod(step, in_epoch)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(1000 * seed + epoch))
    return order[position * size : (position + 1) * size].to(setting.problem.train[0].device)


def _measure(cell: study.Cell, context: study.Context[Config]) -> study.Observations:
    config = context.config
    setting = setting_of(cell, config)
    model = setting.network()
    optimiser = optimiser_of(cell, config, setting, model)
    batches = partial(batch_of, setting, int(cell["batch"]), int(cell["seed"]))
    process = TrackedDescent(model, setting, optimiser, config.measured(), config.top, batches=batches)
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
    at, source = {"optimiser": optimiser, "eta": eta}, page(f"claim {13 if optimiser in BEYOND else 4}")

    def known(expected: study.Expected) -> study.Expected:
        return study.undecided(expected.reason) if optimiser in BEYOND else expected

    sharpens, *at_threshold = [
        claim(f"sharpening-{name}", page("claim 3"), study.Inequality("rising_share", "greater", 0.5),
              f"Below its threshold, {what} sharpens.",
              "Share of the intervals between measurements before the crossing over which the sharpness rises.",
              known(FOUND), at=at),
        claim(f"edge-{name}", source, study.Equivalence("plateau_ratio", 1.0, BAND),
              f"Having reached its threshold, {what} hovers there.",
              "Sharpness over the threshold, the mean over measurements from the first crossing to the end.",
              known(study.supported("The README run stays 1.5 to 6.5 % above it.")), at=at),
        claim(f"above-{name}", source, study.Inequality("plateau_ratio", "greater", 1.0),
              f"The sharpness of {what} is above the threshold on average.",
              "The same mean.",
              study.undecided("The paper asks it as a separate question, by optimiser and loss."), at=at),
        claim(f"survives-{name}", source, study.Inequality("survived", "greater", 0.5),
              f"Having reached its threshold, {what} does not diverge.",
              "Share of the runs that end with a loss below a hundred times the first.",
              known(FOUND), at=at),
    ]  # fmt: skip
    return [sharpens, *map(reaching, at_threshold)]


def _of_gradient_descent(config: Config) -> list[study.Claim]:
    """Claims on its runs at all step sizes that reach their threshold."""
    at = {"optimiser": "gd"}
    return [
        claim("loss-monotone-below", page("claim 6"), study.Inequality("increase_before", "less", 0.02),
              "Below the threshold the loss of gradient descent is monotone.",
              "Share of steps with increasing loss before the first crossing, the mean over step sizes.",
              study.supported("A quadratic with curvature below 2/η descends; the crossing is seen up to --every steps late."),
              at=at),
        claim("loss-rises-at-edge", page("claim 6"), study.Inequality("increase_after", "greater", 0.1),
              "At the edge the loss of gradient descent is not monotone.",
              "Share of steps with increasing loss after the crossing, the mean over step sizes.",
              FOUND, at=at),
        claim("loss-falls-long", page("claim 6"), study.Inequality("long_change", "less", 0.0),
              f"At the edge the loss of gradient descent falls over windows of {LONG} steps.",
              f"Log of the mean loss in the last window of {LONG} steps after the crossing over that in the first.",
              FOUND, at=at),
        claim("above-inverse", page("claim 12"), study.Inequality("above_inverse", "greater", 0.5),
              "Most of the run after the crossing has η > 1/S, against step-size rules η ≤ 1/L.",
              "Share of all measurements of gradient descent with ηS > 1.",
              FOUND, at=at),
        claim("descent-lemma", page("claim 12"), study.Inequality("lemma_broken", "greater", 1 / 3),
              "At the edge the descent lemma's decrease, η‖g‖²/2 a step, is missed in a third of the steps or more.",
              "Share of steps after the crossing with L(k+1) > L(k) − η‖g‖²/2.",
              FOUND, at=at),
        claim("alignment-at-edge", f"{PAPER} (beyond the paper)", study.Inequality("step_share", "greater", 0.5),
              f"At the edge the step of gradient descent lies mostly in the top {config.top} eigenspace of the Hessian.",
              "Share of the step's squared norm there, the mean over measurements after the crossing.",
              study.undecided("It oscillates along the top eigenvector, and that is what the gradient is made of."), at=at),
        claim("plateaus-inverse", page("claim 5"), study.Equivalence("plateau_sharpness", -1.0, 0.1),
              "Plateaus of the sharpness scale as 1/η.",
              "Slope of the log of the mean sharpness after the crossing on log η, over the step sizes.",
              study.supported("Each sits at 2/η."), at=at,
              estimate=partial(study.slope_by_seed, against="eta"),
              assumptions=study.needs_several("eta", "step sizes (--etas)")),
    ]  # fmt: skip


SGD_BATCH = claim(
    "sgd-batch", page("claim 11"), study.Inequality("late_sharpness", "greater", 0.0),
    "SGD settles at lower sharpness the smaller the batch.",
    f"Slope of the log of the sharpness over the last 1/{PLATEAU_SHARE} of the run on log batch size.",
    study.supported("Noise in the gradient acts against sharp directions."), at={"optimiser": "sgd"},
    estimate=partial(study.slope_by_seed, against="batch"),
    assumptions=study.needs_several("batch", "batch sizes (--batch-size)"),
)  # fmt: skip


def _claims(config: Config) -> list[study.Claim]:
    of_runs = itertools.chain.from_iterable(itertools.starmap(_of_run, _runs(config)))
    return [*of_runs, *map(reaching, _of_gradient_descent(config)), SGD_BATCH]


TRAINING: study.Experiment[Config] = study.Experiment(
    name="training", cells=_points, measure=_measure, claims=_claims, seconds=4.0, memory=memory
)
