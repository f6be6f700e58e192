"""The race on the problem of a configuration: who takes part, one run of a method, and the choice of its configuration."""

import copy
import math
from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache
from typing import Literal

import pandas as pd
import torch
from torch.nn.modules.batchnorm import _BatchNorm

from analyses.training.config import Config
from analyses.training.methods import Entrant, described
from analyses.training.races import Race, Target
from analyses.training.run import Run
from curvlab.problems import Problem, resolve
from curvlab.rows.loss import Kind
from curvlab.study import Cell, Context, Trace, follow, observed, stream

TUNING = "tuning"
"""The experiment by which configurations are chosen."""
VARIES: tuple[Literal["initialisation", "batches", "draws"], ...] = ("initialisation", "batches", "draws")
"""What a seed of a run varies: the weights, the order of the batches, and the labels that rows of one sample draw."""


def problem_of(config: Config, seed: int) -> Problem:
    """Return the problem with the network of a seed."""
    return resolve(config.problem, seed=seed).to(config.device, getattr(torch, config.dtype))


@lru_cache(maxsize=1)
def entrants(config: Config) -> tuple[Entrant, ...]:
    """Return the methods that the problem admits: where batch normalisation makes samples interact, none that keeps rows."""
    modules = resolve(config.problem, seed=0).model.modules()
    interact = any(isinstance(module, _BatchNorm) for module in modules)
    return tuple(method for method in config.methods if not (interact and method.keeps_rows))


def entered(method: Entrant, index: int, start: Problem, config: Config, seed: int) -> Run:
    """Return the run of a method in one of its configurations, which trains a copy of the problem's model."""
    problem = replace(start, model=copy.deepcopy(start.model))
    point = method.points[index]
    kind: Kind = "exact" if method.name in config.race.exact else "mc"
    optimisers = method.build(problem.model, problem.loss, point, kind, stream(seed, "labels"))
    label = f"{method.name}, {described(point)}"
    return Run(problem, optimisers, label, config.race, seed, method.passes, autocast=method.autocast)


def run(method: Entrant, index: int, seed: int, context: Context[Config]) -> Trace:
    """Run a method in one of its configurations, from the cell's checkpoint if the run was interrupted."""
    config = context.config
    entry = entered(method, index, problem_of(config, seed), config, seed)
    return follow(entry, config.race.steps, checkpoint=context.checkpoint)


def steps_to(target: Target, trace: Trace, race: Race, quantity: str) -> Mapping[str, object]:
    """Return the observation of the steps after which a run was first seen at a target, the whole budget if it never was."""
    steps = next((seen["step"] for seen in trace.seen if race.reached(target, seen)), None)
    if steps is not None:
        return observed(quantity, steps, status="ok")
    return observed(quantity, race.steps, status="not reached" if trace.diverged is None else trace.status)


def final_loss(trace: Trace, quantity: str) -> Mapping[str, object]:
    """Return the observation of the loss at the end of a run, infinite after divergence."""
    value = float("inf") if trace.diverged is not None else trace.seen[-1]["loss"]
    return observed(quantity, value, status=trace.status)


def trained(trace: Trace, race: Race) -> Mapping[str, object]:
    """Return the observation of whether a run reached the loss and never diverged, 1 or 0."""
    reached = any(race.reached("loss", seen) for seen in trace.seen)
    return observed("trained", float(reached and trace.diverged is None))


def chosen(method: Entrant, context: Context[Config]) -> int:
    """Return the index of the configuration in which a method is judged: the one that did best while it was tuned, if it was."""
    return best(context.rows(TUNING, method=method.name)) if method.tuned else 0


def best(tuned: pd.DataFrame) -> int:
    """Return the index of the configuration that comes first, over the seeds that it was tuned on.

    The one that misses the loss at the fewest seeds comes first; of equal ones the one that diverges at the fewest, then by
    the geometric mean of the steps, then by the mean of the final losses.

    Args:
        tuned: what the tuning of one method measured.
    """
    steps, losses = (tuned[tuned["quantity"] == quantity] for quantity in ("tuning_steps", "tuning_loss"))
    order = {
        "missed": (steps["status"] != "ok").groupby(steps["configuration"]).sum(),
        "diverged": (losses["status"] != "ok").groupby(losses["configuration"]).sum(),
        "steps": steps["value"].map(math.log).groupby(steps["configuration"]).sum().round(9),
        "loss": losses["value"].groupby(losses["configuration"]).mean(),
    }
    return int(pd.DataFrame(order).sort_values(list(order)).index[0])


def seconds(_: Cell, config: Config) -> float:
    """Seconds of a run."""
    return 0.008 * config.race.steps * config.race.cost
