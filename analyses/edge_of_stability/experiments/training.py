"""Training with first-order methods: sharpening, the edge and the loss there (claims 3 to 6, 11 and 12)."""

from functools import partial

import torch
from torch import Tensor, nn

from analyses.edge_of_stability.config import Config
from analyses.edge_of_stability.descent import Descent, descend
from analyses.edge_of_stability.optimisers import Frozen, Optimiser, adam, momentum
from analyses.edge_of_stability.points import BAND, PAPER, memory, points, reaching
from analyses.edge_of_stability.setting import Setting, setting_of
from analyses.edge_of_stability.windows import LONG, Edge
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
    return Frozen(model, live.preconditioner, 0.0, eta)


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
    process = Descent(model, setting, optimiser, config.measured(), config.top, batches=batches)
    trace = descend(process, config.steps, checkpoint=context.checkpoint)
    edge = Edge(trace, optimiser.threshold, float(cell["eta"]))
    last = edge.sharpness[-max(1, len(edge.sharpness) // PLATEAU_SHARE) :]
    return [
        *edge.rows(),
        study.observed("late_sharpness", float(last.mean())),
        study.observed("late_share", float(edge.sharpness[-1] / edge.sharpness.max())),
    ]


def _sharpens(optimiser: str, eta: float) -> study.Claim:
    return study.Claim(
        id=f"sharpening-{optimiser}-{eta:g}",
        statement=f"Below its threshold, {NAMES[optimiser]} at η = {eta:g} sharpens.",
        rule=study.Inequality("rising_share", "greater", 0.5),
        source=f"{PAPER} (docs/theory/cohen_2021.md, claim 3)",
        measured="Share of the intervals between measurements before the crossing over which the sharpness rises.",
        expected=_unless_beyond(optimiser, FOUND),
        at={"optimiser": optimiser, "eta": eta},
    )


def _at_threshold(optimiser: str, eta: float) -> list[study.Claim]:
    """Claims on runs of one optimiser that reach their threshold."""
    name, what = f"{optimiser}-{eta:g}", f"{NAMES[optimiser]} at η = {eta:g}"
    source = f"{PAPER} (docs/theory/cohen_2021.md, claim {'13' if optimiser in BEYOND else '4'})"
    claim = partial(study.Claim, source=source, at={"optimiser": optimiser, "eta": eta})
    return [
        claim(
            id=f"edge-{name}",
            statement=f"Having reached its threshold, {what} hovers there.",
            rule=study.Equivalence("plateau_ratio", 1.0, BAND),
            measured="Sharpness over the threshold, the mean over measurements from the first crossing to the end.",
            expected=_unless_beyond(optimiser, study.supported("The README run stays 1.5 to 6.5 % above it.")),
        ),
        claim(
            id=f"above-{name}",
            statement=f"The sharpness of {what} is above the threshold on average.",
            rule=study.Inequality("plateau_ratio", "greater", 1.0),
            measured="The same mean.",
            expected=study.undecided("The paper asks it as a separate question, by optimiser and loss."),
        ),
        claim(
            id=f"survives-{name}",
            statement=f"Having reached its threshold, {what} does not diverge.",
            rule=study.Inequality("survived", "greater", 0.5),
            measured="Share of the runs that end with a loss below a hundred times the first.",
            expected=_unless_beyond(optimiser, FOUND),
        ),
    ]


def _unless_beyond(optimiser: str, expected: study.Expected) -> study.Expected:
    """What is expected of an optimiser; nobody knows of those beyond the paper."""
    return study.undecided(expected.reason) if optimiser in BEYOND else expected


def _of_gradient_descent(config: Config) -> list[study.Claim]:
    """Claims on its runs at all step sizes that reach their threshold."""
    claim = partial(study.Claim, at={"optimiser": "gd"})
    return [
        claim(
            id="loss-monotone-below",
            statement="Below the threshold the loss of gradient descent is monotone.",
            rule=study.Inequality("increase_before", "less", 0.02),
            source=f"{PAPER} (docs/theory/cohen_2021.md, claim 6)",
            measured="Share of steps with increasing loss before the first crossing, the mean over step sizes.",
            expected=study.supported(
                "A quadratic with curvature below 2/η descends; the crossing is seen up to --every steps late."
            ),
        ),
        claim(
            id="loss-rises-at-edge",
            statement="At the edge the loss of gradient descent is not monotone.",
            rule=study.Inequality("increase_after", "greater", 0.1),
            source=f"{PAPER} (docs/theory/cohen_2021.md, claim 6)",
            measured="Share of steps with increasing loss after the crossing, the mean over step sizes.",
            expected=FOUND,
        ),
        claim(
            id="loss-falls-long",
            statement=f"At the edge the loss of gradient descent falls over windows of {LONG} steps.",
            rule=study.Inequality("long_change", "less", 0.0),
            source=f"{PAPER} (docs/theory/cohen_2021.md, claim 6)",
            measured=f"Log of the mean loss in the last window of {LONG} steps after the crossing over that in the first.",
            expected=FOUND,
        ),
        claim(
            id="above-inverse",
            statement="Most of the run after the crossing has η > 1/S, against step-size rules η ≤ 1/L.",
            rule=study.Inequality("above_inverse", "greater", 0.5),
            source=f"{PAPER} (docs/theory/cohen_2021.md, claim 12)",
            measured="Share of all measurements of gradient descent with ηS > 1.",
            expected=FOUND,
        ),
        claim(
            id="descent-lemma",
            statement="At the edge the descent lemma's decrease, η‖g‖²/2 a step, is missed in a third of the steps or more.",
            rule=study.Inequality("lemma_broken", "greater", 1 / 3),
            source=f"{PAPER} (docs/theory/cohen_2021.md, claim 12)",
            measured="Share of steps after the crossing with L(k+1) > L(k) − η‖g‖²/2.",
            expected=FOUND,
        ),
        claim(
            id="alignment-at-edge",
            statement=f"At the edge the step of gradient descent lies mostly in the top {config.top} eigenspace of the Hessian.",
            rule=study.Inequality("step_share", "greater", 0.5),
            source=f"{PAPER} (beyond the paper)",
            measured="Share of the step's squared norm there, the mean over measurements after the crossing.",
            expected=study.undecided(
                "It oscillates along the top eigenvector, and that is what the gradient is made of."
            ),
        ),
        claim(
            id="plateaus-inverse",
            statement="Plateaus of the sharpness scale as 1/η.",
            rule=study.Equivalence("plateau_sharpness", -1.0, 0.1),
            source=f"{PAPER} (docs/theory/cohen_2021.md, claim 5)",
            measured="Slope of the log of the mean sharpness after the crossing on log η, over the step sizes.",
            expected=study.supported("Each sits at 2/η."),
            estimate=partial(study.slope_by_seed, against="eta"),
            assumptions=study.needs_several("eta", "step sizes (--etas)"),
        ),
    ]


SGD_BATCH = study.Claim(
    id="sgd-batch",
    statement="SGD settles at lower sharpness the smaller the batch.",
    rule=study.Inequality("late_sharpness", "greater", 0.0),
    source=f"{PAPER} (docs/theory/cohen_2021.md, claim 11)",
    measured=f"Slope of the log of the sharpness over the last 1/{PLATEAU_SHARE} of the run on log batch size.",
    expected=study.supported("Noise in the gradient acts against sharp directions."),
    at={"optimiser": "sgd"},
    estimate=partial(study.slope_by_seed, against="batch"),
    assumptions=study.needs_several("batch", "batch sizes (--batch-size)"),
)


def _claims(config: Config) -> list[study.Claim]:
    runs = _runs(config)
    return [
        *(claim for run in runs for claim in (_sharpens(*run), *map(reaching, _at_threshold(*run)))),
        *map(reaching, _of_gradient_descent(config)),
        SGD_BATCH,
    ]


TRAINING: study.Experiment[Config] = study.Experiment(
    name="training", cells=_points, measure=_measure, claims=_claims, seconds=4.0, memory=memory
)
