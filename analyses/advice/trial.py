"""Training with an optimiser that was chosen, and what is seen of the loss of data that neither it nor the choice has seen."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from math import inf

import torch
from torch import Tensor

from analyses.advice.arms import Task
from analyses.advice.config import BATCH, Config
from analyses.clock import now, one_thread
from analyses.specs import classifies_nodes
from curvlab.advice import Candidate
from curvlab.advice.race import Entrant
from curvlab.problems import Problem, resolve
from curvlab.study import generator, stream

SHARES = tuple(2.0**-k for k in range(7, -1, -1))
"""Of the budget, after which the test loss is looked at: the lowest one may come early, where a network begins to overfit."""
STEPS = 500
"""Steps that a run has to take without divergence."""
BLOWN_UP = 10.0
"""A run has diverged when its test loss ends above this many times that before training."""
PORTION = 500
"""Test samples that are evaluated at once."""


def problem_of(name: str, config: Config, seed: int) -> Problem:
    """Return a problem with the network of a seed."""
    return resolve(name, seed=seed).to(config.device, getattr(torch, config.dtype))


def task_of(problem: Problem, name: str, config: Config, seed: int) -> Task:
    """Return what an optimiser is chosen for: the training samples in batches, in the order of a seed; a graph in one."""
    inputs, targets = problem.train
    graph = classifies_nodes(name)
    order = torch.randperm(len(inputs), generator=generator(seed, "batches")).to(inputs.device)
    size = BATCH.get(name, 128)
    parts = [order] if graph or len(order) < size else [part for part in order.split(size) if len(part) == size]
    batches = [(inputs[part], targets[part]) for part in parts]
    return Task(problem.model, problem.loss, batches, graph, partial(now, config.device))


def portions(problem: Problem, *, graph: bool) -> list[tuple[Tensor, Tensor]]:
    """Return the test samples in portions of one size, so that the mean of their losses is that of all of them."""
    inputs, targets = problem.test
    parts = 1 if graph else max(1, round(len(inputs) / PORTION))
    size = len(inputs) // parts
    return [(inputs[k * size : (k + 1) * size], targets[k * size : (k + 1) * size]) for k in range(parts)]


def trained(candidate: Candidate, task: Task, test: list[tuple[Tensor, Tensor]], seconds: float) -> Entrant:
    """Train a copy of the model for some seconds in steps, looked at before them and after `SHARES` of them."""
    run = Entrant.of(candidate, task.model, task.loss, None, graph=task.graph)
    run.look(test)
    for share in SHARES:
        while run.trouble is None and run.seconds < share * seconds:
            run.run(task.batches, -inf, task.clock)  # one step
        run.look(test)
    return run


def diverges(run: Entrant, task: Task, test: list[tuple[Tensor, Tensor]]) -> bool:
    """Train on up to `STEPS`, and return whether the run has diverged."""
    while run.trouble is None and run.steps < STEPS:
        run.run(task.batches, -inf, task.clock)
    return run.trouble is not None or run.look(test) > BLOWN_UP * run.looks[0].loss


@contextmanager
def drawn(seed: int) -> Iterator[None]:
    """Context of one thread, in which global random numbers, such as those of dropout, are those of a seed."""
    with one_thread(), torch.random.fork_rng():
        torch.manual_seed(stream(seed, "draws"))
        yield
