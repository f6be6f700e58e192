"""A network in training, and its matrices at some time of it."""

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor, nn

import curvlab
from analyses.block_structure.config import GGN, HESSIAN, Config
from analyses.block_structure.points import END, MIDDLE, START
from analyses.descent import gradient
from analyses.specs import classifies_nodes
from curvlab import spectrum
from curvlab.problems import Problem, resolve
from curvlab.rows import Rows
from curvlab.rows.parameters import ParameterSpace
from curvlab.spectrum import DenseOperator, Operator
from curvlab.study import generator

CLIP = 1.0
"""Norm to which gradients are cut."""
CHUNK = 64
"""Vectors that go through at once."""
BEGUN = 5
"""The middle of a run is after this part of its steps, when the loss has fallen most."""


@dataclass(frozen=True, eq=False)
class Point:
    """A network at parameters that stay, with the loss terms that its curvature is taken of.

    Attributes:
        model: In evaluation mode.
        loss: Of the problem.
        inputs: Of some training samples.
        targets: Theirs.
    """

    model: nn.Module
    loss: nn.Module
    inputs: Tensor
    targets: Tensor

    @classmethod
    def of(cls, problem: Problem, terms: int, seed: int) -> "Point":
        """Return a problem's network as it is, with as many training samples, drawn by the seed, as have so many loss terms."""
        inputs, targets = problem.train
        if not classifies_nodes(problem.name):
            order = torch.randperm(len(inputs), generator=generator(seed, "curvature"))
            chosen = order[: max(1, terms // terms_of_a_sample(targets))].to(inputs.device)
            inputs, targets = inputs[chosen], targets[chosen]
        return cls(copy.deepcopy(problem.model).eval(), problem.loss, inputs, targets)

    @cached_property
    def space(self) -> ParameterSpace:
        """Names and shapes of the parameters."""
        return ParameterSpace({name: p.shape for name, p in self.model.named_parameters() if p.requires_grad})

    @cached_property
    def parameters(self) -> Float[Tensor, " P"]:
        """The parameters."""
        own = dict(self.model.named_parameters())
        return self.space.flatten({name: own[name].detach() for name in self.space.shapes})

    def loss_at(self, step: Float[Tensor, " P"]) -> float:
        """The loss after a step θ − s."""
        moved = self.space.unflatten(self.parameters - step)
        with torch.no_grad():
            return float(self.loss(torch.func.functional_call(self.model, moved, (self.inputs,)), self.targets))

    @cached_property
    def gradient(self) -> Float[Tensor, " P"]:
        """The gradient of the loss."""
        return self.space.flatten(gradient(lambda model: self.loss(model(self.inputs), self.targets))(self.model))

    @cached_property
    def rows(self) -> Rows:
        """Rows of the Gauss–Newton matrix."""
        return curvlab.sqrt_fisher(self.model, self.loss, self.inputs, self.targets, "ggn")

    @cached_property
    def empirical_rows(self) -> Rows:
        """Rows of the empirical Fisher matrix, one a loss term."""
        return curvlab.sqrt_fisher(self.model, self.loss, self.inputs, self.targets, "empirical")

    def operator(self, matrix: str) -> Operator:
        """A matrix by its products."""
        data = (self.inputs, self.targets)
        if matrix == HESSIAN:
            return spectrum.Hessian(self.model, self.loss, data, chunk_size=CHUNK)
        if matrix == GGN:
            return spectrum.GGN(self.model, self.loss, data, chunk_size=CHUNK)
        return spectrum.Fisher(self.model, self.loss, data, kind="empirical")

    def dense(self, matrix: str) -> DenseOperator:
        """A matrix, formed."""
        if matrix == HESSIAN:
            found = self.operator(HESSIAN).to_dense()
            return DenseOperator((found + found.T) / 2, self.space)
        rows = (self.rows if matrix == GGN else self.empirical_rows).dense()
        return DenseOperator(rows.T @ rows, self.space)


def terms_of_a_sample(targets: Tensor) -> int:
    """How many loss terms a sample has: one, or one a position that has a class."""
    return 1 if targets.is_floating_point() else targets[0].numel()


def problem_of(config: Config, name: str, seed: int, **wanted: int) -> Problem:
    """Return a problem at a seed."""
    problem = resolve(name, **config.arguments(name, **wanted), seed=seed)
    return problem.to(config.device, getattr(torch, config.dtype))


def times(config: Config, problem: Problem, seed: int) -> Iterator[tuple[str, Point]]:
    """Yield a problem's network before training, after a fifth of the steps, and after all of them."""
    problem = copy.deepcopy(problem)
    optimiser = torch.optim.AdamW(problem.model.parameters(), lr=config.rate)
    middle = max(1, config.steps // BEGUN)
    yield START, Point.of(problem, config.terms, seed)
    train(problem, optimiser, range(middle), config.batch, seed)
    yield MIDDLE, Point.of(problem, config.terms, seed)
    train(problem, optimiser, range(middle, config.steps), config.batch, seed)
    yield END, Point.of(problem, config.terms, seed)


def trained(config: Config, problem: Problem, seed: int) -> Point:
    """Return a problem's network after training."""
    *_, (_, point) = times(config, problem, seed)
    return point


def train(
    problem: Problem, optimiser: torch.optim.Optimizer, steps: range, batch: int, seed: int, role: str = "batches"
) -> None:
    """Train a problem's network; step t sees the same samples in every run of a seed and a role."""
    inputs, targets = problem.train
    count = len(inputs) if classifies_nodes(problem.name) else min(batch, len(inputs))
    problem.model.train()
    for step in steps:
        chosen = torch.randperm(len(inputs), generator=generator(seed, role, step))[:count].to(inputs.device)
        optimiser.zero_grad()
        loss: Tensor = problem.loss(problem.model(inputs[chosen]), targets[chosen])
        loss.backward()
        nn.utils.clip_grad_norm_(problem.model.parameters(), CLIP)
        optimiser.step()


@torch.no_grad()
def loss_in_testing(problem: Problem) -> float:
    """The loss on the test samples."""
    model = problem.model.eval()
    return float(problem.loss(model(problem.test[0]), problem.test[1]))
