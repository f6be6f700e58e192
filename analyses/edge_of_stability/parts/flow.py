"""Gradient flow beside gradient descent: sharpening without an edge, and where the two part (claims 3 and 7)."""

from __future__ import annotations

from functools import partial
from typing import Literal

import numpy as np
import pandas as pd
from jaxtyping import Float
from scipy.stats import kendalltau
from torch import from_numpy, nn
from torch.nn.utils import vector_to_parameters

from analyses.edge_of_stability.config import Config
from analyses.edge_of_stability.descent import TOLERANCE, descend, flow
from analyses.edge_of_stability.optimisers import momentum
from analyses.edge_of_stability.part import PAPER, Part, cells_of, of
from analyses.edge_of_stability.setting import Setting, flat, setting_of
from analyses.edge_of_stability.windows import Edge
from analyses.estimates import by_seed, slope_by_seed
from analyses.part import Observations, where
from curvlab.spectrum import eigenpairs
from curvlab.study import Cell, Claim, Inequality

NAME = "flow"
SHARE = 0.3
"""The share of --steps over which flow and descent are compared."""
SWEEPS = {"depth": "sweep_depths", "width": "sweep_widths", "samples": "sweep_samples"}


def _cells(config: Config) -> list[Cell]:
    base = {"eta": config.middle, "sweep": "none"}
    points: list[dict[str, object]] = [base]
    for name, option in SWEEPS.items():
        values = getattr(config, option)
        if values:
            points += [base | {"sweep": name, name: value} for value in sorted({*values, getattr(config, name)})]
    return cells_of(NAME, config, points)


def _sharpness(
    setting: Setting, model: nn.Module, path: Float[np.ndarray, "T P"]
) -> tuple[Float[np.ndarray, " T"], Float[np.ndarray, " T"]]:
    """Return λ_max of the Hessian, and the loss, along a path of parameters."""
    hessian, start, values, losses = setting.hessian(model), None, [], []
    like = flat(model)
    for parameters in path:
        vector_to_parameters(from_numpy(parameters).to(like), model.parameters())
        start = eigenpairs(hessian, 1, start=start, tolerance=TOLERANCE, block=6)
        values.append(float(start.values[0]))  # noqa: PD011
        losses.append(setting.gradient(model)[0])
    return np.array(values), np.array(losses)


def _measure(cell: Cell, config: Config) -> Observations:
    setting, eta = setting_of(cell, config), float(cell["eta"])
    total = int(SHARE * config.steps)
    grid = np.arange(0, total + 1, config.every)
    times = eta * grid
    model = setting.network()
    path = flow(model, setting, times)
    sharpness, losses = _sharpness(setting, model, path)
    rows: list[dict[str, object]] = [
        {"quantity": "flow_trend", "value": float(kendalltau(times, sharpness).statistic)},
        {"quantity": "flow_growth", "value": float(np.log(sharpness[-1] / sharpness[0]))},
    ]
    for quantity, series in (("flow_sharpness", sharpness), ("flow_loss", losses)):
        rows += [
            {"quantity": quantity, "value": float(v), "time": float(t)} for t, v in zip(times, series, strict=True)
        ]
    if cell["sweep"] != "none":
        return rows
    return rows + _against_descent(setting, eta, grid, path, sharpness)


def _against_descent(
    setting: Setting,
    eta: float,
    grid: Float[np.ndarray, " T"],
    path: Float[np.ndarray, "T P"],
    sharpness: Float[np.ndarray, " T"],
) -> list[dict[str, object]]:
    """Distance between flow and descent, before and after the flow's sharpness passes 2/η."""
    model = setting.network()
    optimiser = momentum(model, "gd", eta, 0.0)
    places: list[Float[np.ndarray, " P"]] = []
    shown = frozenset(int(step) for step in grid)

    def observe(step: int, now: nn.Module) -> None:
        if step in shown:
            places.append(np.asarray(flat(now).numpy(force=True), dtype=float))

    run = descend(model, setting, optimiser, int(grid[-1]), sorted(shown), top=1, observe=observe)
    edge = Edge(run, optimiser.threshold, eta)
    count = len(places)
    times = eta * grid[:count]
    distance = np.linalg.norm(np.array(places) - path[:count], axis=1)
    rows: list[dict[str, object]] = [
        {"quantity": "distance", "value": float(d), "time": float(t)} for t, d in zip(times, distance, strict=True)
    ]
    rows += [
        {"quantity": "descent_sharpness", "value": float(s), "time": eta * float(k)}
        for k, s in zip(edge.steps, edge.sharpness, strict=True)
    ]
    above = np.flatnonzero(sharpness[:count] >= optimiser.threshold)
    crossed = bool(len(above)) and 0 < above[0] < count - 1
    rows.append({"quantity": "crossed", "value": float(crossed)})
    if crossed:
        i = int(above[0])
        s0, s1 = sharpness[i - 1], sharpness[i]
        crossing = float(times[i - 1] + (optimiser.threshold - s0) / (s1 - s0) * (times[i] - times[i - 1]))
        at = float(np.interp(crossing, times, distance))
        moved = np.linalg.norm(path[:count] - path[0], axis=1)
        before, after = at / crossing, (distance[-1] - at) / (times[-1] - crossing)
        rows += [
            {"quantity": "crossing_time", "value": crossing},
            {"quantity": "distance_share", "value": at / float(np.interp(crossing, times, moved))},
            {"quantity": "log_slopes", "value": float(np.log2(max(after, 1e-12) / before))},
        ]
    return rows


def _outside(table: pd.DataFrame) -> str | None:
    crossed = table.loc[table["quantity"] == "crossed", "value"]
    if crossed.any():
        return None
    return f"The flow's sharpness does not pass 2/η in any of {len(crossed)} runs."


def _growth_slope(table: pd.DataFrame, against: str) -> pd.DataFrame:
    return slope_by_seed(table.assign(value=np.exp(table["value"])), against)


def _claims(config: Config) -> list[Claim]:
    here = where(NAME, sweep="none")
    claims = [
        Claim(
            id="flow-sharpens",
            statement="Along gradient flow the sharpness keeps rising.",
            source=f"{PAPER} (theory file, claim 3)",
            measured="Kendall's τ of the sharpness with time.",
            rule=Inequality(0.5, "greater"),
            estimate=by_seed,
            expected="supported",
            reason="The paper finds it rising fivefold on CIFAR-10.",
            needs=here,
            quantities=("flow_trend",),
        ),
        Claim(
            id="flow-grows",
            statement="Gradient flow ends sharper than it began.",
            source=f"{PAPER} (theory file, claim 3)",
            measured="Log of the sharpness at the end over that at the start.",
            rule=Inequality(0.0, "greater"),
            estimate=by_seed,
            expected="supported",
            reason="The paper finds it on CIFAR-10.",
            needs=here,
            quantities=("flow_growth",),
        ),
        Claim(
            id="flow-followed",
            statement="Gradient descent follows the flow until the sharpness crosses 2/η.",
            source=f"{PAPER} (theory file, claim 7)",
            measured="Distance of the two at the flow's crossing over the distance that the flow has gone by then.",
            rule=Inequality(0.1, "less"),
            estimate=of("distance_share"),
            expected="supported",
            reason="Every mode is stable, and steps are short against the flow's time scales.",
            assumptions=_outside,
            needs=here,
            quantities=("crossed", "distance_share"),
        ),
        Claim(
            id="flow-left",
            statement="Past the crossing gradient descent departs from the flow at more than twice the rate before.",
            source=f"{PAPER} (theory file, claim 7)",
            measured="Log2 of the mean growth of the distance per time after the crossing over that before.",
            rule=Inequality(1.0, "greater"),
            estimate=of("log_slopes"),
            expected="supported",
            reason="The flow goes on where descent cannot.",
            assumptions=_outside,
            needs=here,
            quantities=("crossed", "log_slopes"),
        ),
    ]
    signs: dict[str, tuple[Literal["less", "greater"], str]] = {
        "depth": ("greater", "more with depth"),
        "width": ("less", "less in wide networks"),
        "samples": ("greater", "more with more data"),
    }
    for name, (direction, words) in signs.items():
        if getattr(config, SWEEPS[name]):
            claims.append(
                Claim(
                    id=f"sharpening-{name}",
                    statement=f"Progressive sharpening: {words}.",
                    source=f"{PAPER} (theory file, claim 3)",
                    measured=f"Slope of the growth of the flow's sharpness, S(end)/S(0), on {name}, both in logs.",
                    rule=Inequality(0.0, direction),
                    estimate=partial(_growth_slope, against=name),
                    expected="supported",
                    reason="The paper's secondary statement.",
                    needs=where(NAME, sweep=name),
                    quantities=("flow_growth",),
                )
            )
    return claims


PART = Part(NAME, _cells, _measure, _claims, seconds=lambda _: 4.0)
