"""Gradient flow beside gradient descent: sharpening without an edge, and where the two part (claims 3 and 7)."""

from collections.abc import Mapping
from functools import partial
from typing import Any, Literal

import numpy as np
from jaxtyping import Float
from scipy.stats import kendalltau
from torch import from_numpy, nn
from torch.nn.utils import vector_to_parameters

from analyses.claims import claim
from analyses.edge_of_stability.config import Config
from analyses.edge_of_stability.descent import TOLERANCE, edge_of, flow, gradient_descent
from analyses.edge_of_stability.points import memory, page, points
from analyses.edge_of_stability.setting import Setting, flat, setting_of
from curvlab import study
from curvlab.spectrum import eigenpairs

SHARE = 0.3
"""The share of --steps over which flow and descent are compared."""
SWEEPS: Mapping[str, tuple[str, Literal["less", "greater"], str]] = {
    "depth": ("sweep_depths", "greater", "more with depth"),
    "width": ("sweep_widths", "less", "less in wide networks"),
    "samples": ("sweep_samples", "greater", "more with more data"),
}
"""By what is swept: the option with its values, and how the flow's sharpening goes with it, by sign and in words."""


def _points(config: Config) -> list[study.Point]:
    base = {"eta": config.middle, "sweep": "none"}
    swept = [
        {**base, "sweep": name, name: value}
        for name, (option, _, _) in SWEEPS.items()
        if getattr(config, option)
        for value in sorted({*getattr(config, option), getattr(config, name)})
    ]
    return points(config, [base, *swept])


def _sharpness(
    setting: Setting, model: nn.Module, path: Float[np.ndarray, "T P"]
) -> tuple[Float[np.ndarray, " T"], Float[np.ndarray, " T"]]:
    """Return λ_max of the Hessian, and the loss, along a path of parameters."""
    hessian = setting.hessian(model)
    like = flat(model)
    start = None
    values, losses = [], []
    for parameters in path:
        vector_to_parameters(from_numpy(parameters).to(like), model.parameters())
        start = eigenpairs(hessian, 1, start=start, tolerance=TOLERANCE, block=6)
        values.append(float(start.values[0]))
        losses.append(setting.gradient(model)[0])
    return np.array(values), np.array(losses)


def _course(quantity: str, times: Float[np.ndarray, " T"], series: Float[np.ndarray, " T"]) -> list[dict[str, object]]:
    return [study.observed(quantity, float(v), time=float(t)) for t, v in zip(times, series, strict=True)]


def _measure(cell: study.Cell, context: study.Context[Config]) -> study.Observations:
    config = context.config
    setting, eta = setting_of(cell, config), float(cell["eta"])
    grid = config.measured(int(SHARE * config.steps))
    times = eta * np.array(grid)
    model = setting.network()
    path = flow(model, setting, times)
    sharpness, losses = _sharpness(setting, model, path)
    rows = [
        study.observed("flow_trend", float(kendalltau(times, sharpness).statistic)),
        study.observed("flow_growth", float(sharpness[-1] / sharpness[0])),
        *_course("flow_sharpness", times, sharpness),
        *_course("flow_loss", times, losses),
    ]
    if cell["sweep"] != "none":
        return rows
    return rows + _against_descent(setting, eta, grid, path, sharpness)


def _against_descent(
    setting: Setting, eta: float, grid: range, path: Float[np.ndarray, "T P"], sharpness: Float[np.ndarray, " T"]
) -> list[dict[str, object]]:
    """Distance between flow and descent, before and after the flow's sharpness passes 2/η."""

    def place(model: nn.Module) -> dict[str, Float[np.ndarray, " P"]]:
        return {"place": np.asarray(flat(model).numpy(force=True), dtype=float)}

    edge = edge_of(gradient_descent(setting, eta, grid, top=1, see=place), grid[-1])
    places = edge.trace.series("place")
    count = len(places)
    times = eta * np.array(grid)[:count]
    distance = np.linalg.norm(places - path[:count], axis=1)
    above = np.flatnonzero(sharpness[:count] >= edge.threshold)
    rows = [*_course("distance", times, distance), *_course("descent_sharpness", eta * edge.steps, edge.sharpness)]
    if not len(above) or not 0 < above[0] < count - 1:
        apart = study.outside("the flow's sharpness does not pass 2/η")
        return rows + [study.observed(name, np.nan, **apart) for name in ("distance_share", "slopes")]
    i = int(above[0])
    s0, s1 = sharpness[i - 1], sharpness[i]
    crossing = float(times[i - 1] + (edge.threshold - s0) / (s1 - s0) * (times[i] - times[i - 1]))
    at = float(np.interp(crossing, times, distance))
    moved = np.linalg.norm(path[:count] - path[0], axis=1)
    before, after = at / crossing, (distance[-1] - at) / (times[-1] - crossing)
    return [
        *rows,
        study.observed("crossing_time", crossing),
        study.observed("distance_share", at / float(np.interp(crossing, times, moved))),
        study.observed("slopes", float(after / before)),
    ]


ALONE: dict[str, Any] = {"group": "paper", "at": {"sweep": "none"}}

CLAIMS = [
    claim("flow-sharpens", page("claim 3"), study.Inequality("flow_trend", "greater", 0.5, centre="mean"),
          "Along gradient flow the sharpness keeps rising.",
          "Kendall's τ of the sharpness with time.",
          study.supported("The paper finds it rising fivefold on CIFAR-10."), **ALONE),
    claim("flow-grows", page("claim 3"), study.Inequality("flow_growth", "greater", 1.0, centre="geometric mean"),
          "Gradient flow ends sharper than it began.",
          "Sharpness at the end over that at the start.",
          study.supported("The paper finds it on CIFAR-10."), bound_from="1 as a ratio", **ALONE),
    claim("flow-followed", page("claim 7"), study.Inequality("distance_share", "less", 0.1, centre="geometric mean"),
          "Gradient descent follows the flow until the sharpness crosses 2/η.",
          "Distance of the two at the flow's crossing over the distance that the flow has gone by then.",
          study.supported("Every mode is stable, and steps are short against the flow's time scales."), **ALONE),
    claim("flow-left", page("claim 7"), study.Inequality("slopes", "greater", 2.0, centre="geometric mean"),
          "Past the crossing gradient descent departs from the flow at more than twice the rate before.",
          "Mean growth of the distance per time after the crossing over that before.",
          study.supported("The flow goes on where descent cannot."), **ALONE),
    *(
        claim(f"sharpening-{name}", page("claim 3"), study.Inequality("flow_growth", direction, 0.0, centre="mean"),
              f"Progressive sharpening: {words}.",
              f"Slope of the growth of the flow's sharpness, S(end)/S(0), on {name}, both in logs.",
              study.supported("The paper's secondary statement."), group="paper", at={"sweep": name},
              bound_from="no dependence", estimate=partial(study.slope_by_seed, against=name))
        for name, (_, direction, words) in SWEEPS.items()
    ),
]  # fmt: skip

FLOW: study.Experiment[Config] = study.Experiment(
    name="flow",
    cells=_points,
    measure=_measure,
    varies=("initialisation",),
    claims=CLAIMS,
    seconds=4.0,
    memory=memory,
)
