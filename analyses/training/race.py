"""A race on the problem of a configuration: who takes part, and one run of a method."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache

import torch
from torch import nn

from analyses.assembly import digest_of
from analyses.training.config import Config
from analyses.training.methods import Method, Optimiser, Point
from analyses.training.run import Checkpoint, Trace, train
from curvlab.fisher import STRUCTURES
from curvlab.problems import Problem, resolve
from curvlab.tools.storage import digest

TUNING_SEED = 1000
"""Seed of network, batches and draws while configurations are chosen; judged runs have seeds from 0."""


def problem_of(config: Config, seed: int) -> Problem:
    """Return the problem with the network of a seed.

    Raises:
        ValueError: its targets are not classes.
    """
    problem = resolve(config.problem, seed=seed).to(config.device, getattr(torch, config.dtype))
    if problem.train[1].is_floating_point():
        raise ValueError(f"Problem {problem.name!r} has no classes as targets, so that there is no accuracy to reach.")
    return problem


@lru_cache(maxsize=4)
def entrants(config: Config) -> tuple[Method, ...]:
    """Return the methods that the problem admits: with batch normalisation, no structures that are made of rows."""
    modules = resolve(config.problem, seed=0).model.modules()
    coupled = any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in modules)
    return tuple(
        method
        for method in config.methods
        if not (coupled and method.structure and not STRUCTURES[method.structure].averages)
    )


def optimiser_of(method: Method, problem: Problem, point: Point, config: Config, seed: int) -> Optimiser:
    """Make a method's optimiser of a problem's model."""
    kind = "exact" if method.name in config.task.exact else "mc"
    return method.build(problem.model, problem.loss, point, kind, seed)  # type: ignore[arg-type]


def race(method: Method, index: int, config: Config, seed: int) -> Trace:
    """Run a method in one of its configurations, from a checkpoint if the run was interrupted."""
    point: Mapping[str, float] = method.points[index]
    problem = problem_of(config, seed)
    name = digest(
        [config.problem, config.dtype, vars(config.task), method.name, dict(point), seed, digest_of(problem)]
    )[:40]
    folder = config.results / ".cache" / "training" / "checkpoints"
    checkpoint = Checkpoint(folder / f"{name}.pt")
    if config.fresh:
        checkpoint.remove()
    return train(
        problem, optimiser_of(method, problem, point, config, seed), config.task, seed, checkpoint, passes=method.passes
    )
