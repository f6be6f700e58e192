"""Training with first-order methods: sharpening, the edge and the loss there (claims 3 to 6, 11 and 12)."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor, nn

from analyses.edge_of_stability.config import Config
from analyses.edge_of_stability.descent import Run, descend
from analyses.edge_of_stability.optimisers import Optimiser, adam, frozen, momentum
from analyses.edge_of_stability.part import BAND, PAPER, REACHED, Part, cells_of, must_reach
from analyses.edge_of_stability.setting import Setting, setting_of
from analyses.edge_of_stability.windows import LONG, Edge
from analyses.estimates import by_seed, slope_by_seed
from analyses.part import Expectation, Observations, where
from curvlab.spectrum import DiagonalPreconditioner
from curvlab.study import Cell, Claim, Equivalence, Inequality

NAME = "training"
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


def _cells(config: Config) -> list[Cell]:
    runs = {
        "gd": config.etas,
        "heavy-ball": config.heavy_ball,
        "nesterov": config.nesterov,
        "adam": config.adam,
        "adam-frozen": config.adam,
    }
    points: list[dict[str, object]] = [
        {"optimiser": optimiser, "eta": eta, "batch": 0} for optimiser, etas in runs.items() for eta in etas
    ]
    points += [{"optimiser": "sgd", "eta": config.middle, "batch": batch} for batch in config.batch_size]
    return cells_of(NAME, config, points)


def optimiser_of(cell: Cell, config: Config, setting: Setting, model: nn.Module) -> Optimiser:
    """Return the optimiser that a cell names."""
    name, eta = str(cell["optimiser"]), float(cell["eta"])
    if name in ("gd", "sgd"):
        return momentum(model, "gd", eta, 0.0)
    if name in ("heavy-ball", "nesterov"):
        return momentum(model, name, eta, config.beta)
    live = adam(model, eta)
    if name == "adam":
        return live
    assert isinstance(live.steps, torch.optim.Adam)
    for _ in range(config.steps // WARM_UP):
        setting.gradient(model)
        live.steps.step()
    return frozen(model, DiagonalPreconditioner.adam(model, live.steps), 0.0, eta)


def batch_of(setting: Setting, size: int, seed: int, step: int) -> Tensor | None:
    """Samples of a step of SGD, a shuffled epoch cut into batches; all if the size is 0."""
    if not size:
        return None
    count = len(setting.problem.train[0])
    in_epoch = -(-count // size)
    epoch, position = divmod(step, in_epoch)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(1000 * seed + epoch))
    return order[position * size : (position + 1) * size].to(setting.problem.train[0].device)


def measured_steps(config: Config, steps: int | None = None) -> range:
    """The steps before which a run is measured."""
    return range(0, (config.steps if steps is None else steps) + 1, config.every)


def checkpoint_of(cell: Cell, config: Config) -> Path:
    """Where a long run is saved."""
    key = repr((cell.key, config.steps, config.every, config.dtype, config.network, config.width, config.depth))
    key += repr((config.samples, config.scaling, config.loss, config.top, config.beta))
    name = hashlib.sha256(key.encode()).hexdigest()[:16]
    return config.results / ".cache" / "edge_of_stability" / "runs" / f"{name}.pt"


def rows_of(run: Run, edge: Edge) -> list[dict[str, object]]:
    """Return a run as observations: what claims decide on, and its course."""
    rows: list[dict[str, object]] = [{"quantity": name, "value": value} for name, value in edge.quantities().items()]
    if run.diverged is not None:
        rows.append(
            {"quantity": "diverged", "value": float(run.diverged), "status": f"diverged at step {run.diverged}"}
        )
    for point in run.points:
        course: dict[str, float | None] = {
            "sharpness": point.eigenvalues[0],
            "second": point.eigenvalues[1] if len(point.eigenvalues) > 1 else None,
            "ratio": point.eigenvalues[0] / edge.threshold,
            "loss": run.losses[point.step],
            "gradient_alignment": point.gradient_share,
            "step_alignment": point.step_share,
        }
        for quantity, value in course.items():
            if value is not None:
                rows.append({"quantity": quantity, "value": value, "step": point.step, "threshold": edge.threshold})
    return rows


def _measure(cell: Cell, config: Config) -> Observations:
    setting = setting_of(cell, config)
    model = setting.network()
    optimiser = optimiser_of(cell, config, setting, model)
    size, seed = int(cell["batch"]), int(cell["seed"])
    run = descend(
        model,
        setting,
        optimiser,
        config.steps,
        measured_steps(config),
        top=config.top,
        batches=lambda step: batch_of(setting, size, seed, step),
        checkpoint=checkpoint_of(cell, config),
    )
    edge = Edge(run, optimiser.threshold, float(cell["eta"]))
    rows = rows_of(run, edge)
    last = edge.sharpness[-max(1, len(edge.sharpness) // PLATEAU_SHARE) :]
    rows.append({"quantity": "late_sharpness", "value": float(last.mean())})
    rows.append({"quantity": "late_share", "value": float(edge.sharpness[-1] / edge.sharpness.max())})
    return rows


def batch_slope(table: pd.DataFrame) -> pd.DataFrame:
    """Estimate by the slope of log sharpness on log batch size; the full batch has 0."""
    return slope_by_seed(table[table["batch"] > 0], "batch")


def _claims(config: Config) -> list[Claim]:
    claims = [claim for optimiser, etas in _runs(config) for eta in etas for claim in _edge_claims(optimiser, eta)]
    gd = where(NAME, optimiser="gd")
    claims += [
        _claim(
            "loss-monotone-below",
            "Below the threshold the loss of gradient descent is monotone.",
            "6",
            "Share of steps with increasing loss before the first crossing, the mean over step sizes.",
            Inequality(0.02, "less"),
            ("increase_before",),
            gd,
            reason="A quadratic with curvature below 2/η descends; the crossing is seen up to --every steps late.",
        ),
        _claim(
            "loss-rises-at-edge",
            "At the edge the loss of gradient descent is not monotone.",
            "6",
            "Share of steps with increasing loss after the crossing, the mean over step sizes.",
            Inequality(0.1, "greater"),
            ("increase_after",),
            gd,
        ),
        _claim(
            "loss-falls-long",
            f"At the edge the loss of gradient descent falls over windows of {LONG} steps.",
            "6",
            f"Log of the mean loss in the last window of {LONG} steps after the crossing over that in the first.",
            Inequality(0.0, "less"),
            ("long_change",),
            gd,
        ),
        _claim(
            "above-inverse",
            "Most of the run after the crossing has η > 1/S, against step-size rules η ≤ 1/L.",
            "12",
            "Share of all measurements of gradient descent with ηS > 1.",
            Inequality(0.5, "greater"),
            ("above_inverse",),
            gd,
        ),
        _claim(
            "descent-lemma",
            "At the edge the descent lemma's decrease, η‖g‖²/2 a step, is missed in a third of the steps or more.",
            "12",
            "Share of steps after the crossing with L(k+1) > L(k) − η‖g‖²/2.",
            Inequality(1 / 3, "greater"),
            ("lemma_broken",),
            gd,
        ),
        _claim(
            "alignment-at-edge",
            f"At the edge the step of gradient descent lies mostly in the top {config.top} eigenspace of the Hessian.",
            "beyond the paper",
            "Share of the step's squared norm there, the mean over measurements after the crossing.",
            Inequality(0.5, "greater"),
            ("step_share",),
            gd,
            expected="open",
            reason="It oscillates along the top eigenvector, and that is what the gradient is made of.",
        ),
    ]
    if len(config.etas) > 1:
        claims.append(
            _claim(
                "plateaus-inverse",
                "Plateaus of the sharpness scale as 1/η.",
                "5",
                "Slope of the log of the mean sharpness after the crossing on log η, over the step sizes.",
                Equivalence(-1.0, 0.1),
                ("plateau_sharpness",),
                gd,
                estimate=lambda table: slope_by_seed(table, "eta"),
                reason="Each sits at 2/η.",
            )
        )
    if len(set(config.batch_size)) > 1:
        claims.append(
            Claim(
                id="sgd-batch",
                statement="SGD settles at lower sharpness the smaller the batch.",
                source=f"{PAPER} (theory file, claim 11)",
                measured=f"Slope of the log of the sharpness over the last 1/{PLATEAU_SHARE} of the run on log batch size.",
                rule=Inequality(0.0, "greater"),
                estimate=batch_slope,
                expected="supported",
                reason="Noise in the gradient acts against sharp directions.",
                needs=where(NAME, optimiser="sgd"),
                quantities=("late_sharpness",),
            )
        )
    return claims


def _runs(config: Config) -> list[tuple[str, tuple[float, ...]]]:
    runs = [("gd", config.etas), ("heavy-ball", config.heavy_ball), ("nesterov", config.nesterov)]
    return [*runs, ("adam", config.adam), ("adam-frozen", config.adam)]


def _claim(
    id_: str,
    statement: str,
    number: str,
    measured: str,
    rule: Equivalence | Inequality,
    quantities: tuple[str, ...],
    needs: Callable[[Cell], bool],
    *,
    estimate: Callable[[pd.DataFrame], pd.DataFrame] = by_seed,
    expected: Expectation = "supported",
    reason: str = "The paper finds it on CIFAR-10.",
) -> Claim:
    """Return a claim on runs that reach their threshold."""

    def read(table: pd.DataFrame) -> pd.DataFrame:
        return estimate(table[table["quantity"].isin(quantities)])

    where_from = f"theory file, claim {number}" if number[0].isdigit() else number
    return Claim(
        id=id_,
        statement=statement,
        source=f"{PAPER} ({where_from})",
        measured=measured,
        rule=rule,
        estimate=read,
        expected=expected,
        reason=reason,
        assumptions=must_reach,
        needs=needs,
        quantities=(*quantities, REACHED),
    )


def _edge_claims(optimiser: str, eta: float) -> list[Claim]:
    at, name = where(NAME, optimiser=optimiser, eta=eta), f"{optimiser}-{eta:g}"
    what = f"{NAMES[optimiser]} at η = {eta:g}"
    beyond = optimiser.startswith("adam")
    number = "13" if beyond else "4"
    expected: Expectation = "open" if beyond else "supported"
    return [
        Claim(
            id=f"sharpening-{name}",
            statement=f"Below its threshold, {what} sharpens.",
            source=f"{PAPER} (theory file, claim 3)",
            measured="Share of the intervals between measurements before the crossing over which the sharpness rises.",
            rule=Inequality(0.5, "greater"),
            estimate=by_seed,
            expected=expected,
            reason="The paper finds it on CIFAR-10.",
            needs=at,
            quantities=("rising_share",),
        ),
        _claim(
            f"edge-{name}",
            f"Having reached its threshold, {what} hovers there.",
            number,
            "Sharpness over the threshold, the mean over measurements from the first crossing to the end.",
            Equivalence(1.0, BAND),
            ("plateau_ratio",),
            at,
            expected=expected,
            reason="The README run stays 1.5 to 6.5 % above it.",
        ),
        _claim(
            f"above-{name}",
            f"The sharpness of {what} is above the threshold on average.",
            number,
            "The same mean.",
            Inequality(1.0, "greater"),
            ("plateau_ratio",),
            at,
            expected="open",
            reason="The paper asks it as a separate question, by optimiser and loss.",
        ),
        _claim(
            f"survives-{name}",
            f"Having reached its threshold, {what} does not diverge.",
            number,
            "Share of the runs that end with a loss below a hundred times the first.",
            Inequality(0.5, "greater"),
            ("survived",),
            at,
            expected=expected,
        ),
    ]


PART = Part(NAME, _cells, _measure, _claims, seconds=lambda _: 4.0)
