"""One run of the published protocol: a two-layer graph convolutional network, the whole graph in every step.

The loss at epoch e is the mean over training nodes plus λ(e) times the mean over all others, whose labels are those that
the network predicts in the same pass. It is a weighted cross-entropy: training nodes weigh 1, others
μ = λ N_train/(N − N_train), and the sum of the weights is Ω = N_train (1 + λ).
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import lru_cache
from math import isfinite

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from analyses.assembly import problem_faults
from analyses.gnn_natural_gradient.recipe import Recipe
from curvlab.fisher import KFAC
from curvlab.nn import GraphNetwork, Propagation, WeightedCrossEntropy, gcn
from curvlab.optim import Preconditioner
from curvlab.problems import LabelledGraph, load_graph

DROPOUT = 0.5
MOMENTUM = 0.9


@lru_cache(maxsize=3)
@problem_faults()
def graph_of(name: str, split: str) -> LabelledGraph:
    """Return a graph.

    Raises:
        DataUnavailable: of `curvlab.study`: its files are absent.
    """
    return load_graph(name, split)  # type: ignore[arg-type]


@dataclass(frozen=True, eq=False)
class Setting:
    """A graph on a device, and its features ÂX, which no epoch changes."""

    graph: LabelledGraph
    features: Float[Tensor, "N F"]
    aggregated: Float[Tensor, "N F"]
    labels: Int[Tensor, " N"]
    trains: Bool[Tensor, " N"]

    @property
    def others(self) -> float:
        """(N − N_train)/N_train."""
        labelled = int(self.trains.sum())
        return (len(self.trains) - labelled) / labelled

    def network(self, recipe: Recipe, seed: int, dropout: float = DROPOUT) -> GraphNetwork:
        """Return the network with the weights of a seed."""
        model = gcn(
            self.features,
            self.graph.edge_index.to(self.features.device),
            (recipe.width, self.graph.classes),
            dropout=dropout,
            generator=torch.Generator().manual_seed(seed),
        )
        chain = list(model.network)
        if recipe.aggregated:
            return GraphNetwork(self.aggregated, nn.Sequential(*chain[1:]))
        for place, module in enumerate(chain):
            if isinstance(module, nn.Linear):
                chain[place - 1 : place + 1] = module, chain[place - 1]
        return GraphNetwork(self.features, nn.Sequential(*chain))


@lru_cache(maxsize=3)
def setting_of(problem: str, split: str, device: str, dtype: str) -> Setting:
    """Return a graph on a device."""
    graph = graph_of(problem, split)
    features = graph.features.to(device, getattr(torch, dtype))
    propagation = Propagation(graph.edge_index.to(device), len(features), dtype=features.dtype).to(device)
    trains = torch.zeros(len(features), dtype=torch.bool, device=device)
    trains[graph.train] = True
    return Setting(graph, features, propagation(features), graph.labels.to(device), trains)


class Schedule:
    """λ along a run, in the loss and in the Fisher matrix; epochs count from 1."""

    def __init__(self, recipe: Recipe, epochs: int, others: float) -> None:
        self.recipe, self.epochs, self._others = recipe, epochs, others

    def _weight(self, epoch: int) -> float:
        return 0.0 if self.recipe.gamma is None else (epoch / self.epochs) ** self.recipe.gamma

    def in_loss(self, epoch: int) -> float:
        """λ of the loss."""
        return self._weight(epoch) if self.recipe.in_loss else 0.0

    def nodes(self, epoch: int) -> float:
        """n/Ω: the divisor of the factors, N_train + λ (N − N_train), over the one that the loss applies."""
        in_fisher = self._weight(epoch) if self.recipe.in_fisher else 0.0
        return (1 + in_fisher * self._others) / (1 + self.in_loss(epoch))


class Natural:
    """Izadi et al.'s preconditioner: (A + √ε I)⁻¹ ∇W (G + √ε I)⁻¹ with A = Σ x̄x̄ᵀ/n and G = Σ ggᵀ/n over all nodes.

    `KFAC(sharing="gradient")` divides both factors by Ω, so it is given the damping ε (n/Ω)², and the direction is multiplied
    by (n/Ω)². g is the gradient of the log-likelihood Σ_i w_i ln p_i of which the loss is the mean.
    """

    def __init__(self, model: nn.Module, loss: nn.Module, recipe: Recipe, schedule: Schedule, seed: int) -> None:
        self._parameters = list(model.parameters())
        self._nodes: Callable[[int], float] = lambda step: schedule.nodes(step - step % recipe.refresh + 1)
        self._preconditioner = Preconditioner(
            model,
            loss,
            KFAC(sharing="gradient", factored_damping="equal"),
            kind=recipe.kind,
            damping=lambda step: recipe.epsilon * self._nodes(step) ** 2,
            decay=0.0,
            refresh_every=recipe.refresh,
            graph=True,
            seed=seed,
        )

    def collect(self) -> AbstractContextManager[None]:
        """Context of a forward and backward pass."""
        return self._preconditioner.collect() if self._preconditioner.due else nullcontext()

    def precondition(self) -> None:
        """Turn gradients into natural ones."""
        scale = self._nodes(self._preconditioner.steps) ** 2
        self._preconditioner.precondition()
        for parameter in self._parameters:
            if parameter.grad is not None:
                parameter.grad.mul_(scale)


@dataclass
class Trace:
    """What a run has shown after every epoch; it ends early where it diverged."""

    validation_loss: list[float] = field(default_factory=list)
    validation_accuracy: list[float] = field(default_factory=list)
    test_accuracy: list[float] = field(default_factory=list)
    diverged: bool = False

    @property
    def status(self) -> str:
        """Whether the run diverged, as measurements say it."""
        return "diverged" if self.diverged else "ok"

    @property
    def best(self) -> int:
        """Index of the epoch with the lowest validation loss."""
        return int(np.argmin(self.validation_loss))


class Run:
    """A network, its optimiser and its preconditioner, epoch by epoch."""

    def __init__(self, setting: Setting, recipe: Recipe, seed: int, epochs: int) -> None:
        self.setting, self.model = setting, setting.network(recipe, seed)
        self._all = torch.arange(len(setting.labels), device=setting.labels.device)
        self._loss = WeightedCrossEntropy(setting.trains.to(setting.features.dtype))
        self._schedule = Schedule(recipe, epochs, setting.others)
        self._natural = Natural(self.model, self._loss, recipe, self._schedule, seed) if recipe.kfac else None
        self._optimiser: torch.optim.Optimizer = (
            torch.optim.Adam(self.model.parameters(), recipe.lr, weight_decay=recipe.weight_decay)
            if recipe.optimiser == "adam"
            else torch.optim.SGD(self.model.parameters(), recipe.lr, MOMENTUM, weight_decay=recipe.weight_decay)
        )
        self._epoch = 0

    def step(self) -> None:
        """Take the step of an epoch.

        Raises:
            FloatingPointError: the loss before it is not finite.
        """
        self._epoch += 1
        weight = self._schedule.in_loss(self._epoch)
        if weight:
            labelled = self.setting.trains.to(self.setting.features.dtype)
            self._loss.weights = labelled + (1 - labelled) * (weight / self.setting.others)
        self._optimiser.zero_grad()
        with nullcontext() if self._natural is None else self._natural.collect():
            outputs = self.model(self._all)
            targets = torch.where(self.setting.trains, self.setting.labels, outputs.detach().argmax(1))
            loss = (1 + weight) * self._loss(outputs, targets)
            if not bool(loss.isfinite()):
                raise FloatingPointError(f"The loss at epoch {self._epoch} is not finite.")
            loss.backward()
        if self._natural is not None:
            self._natural.precondition()
        self._optimiser.step()

    def evaluate(self, trace: Trace) -> None:
        """Add the network's present loss and accuracies, without dropout."""
        graph, labels = self.setting.graph, self.setting.labels
        self.model.eval()
        with torch.no_grad():
            outputs = self.model(self._all)
        self.model.train()
        right = outputs.argmax(1) == labels
        validation = nn.functional.cross_entropy(outputs[graph.validation], labels[graph.validation])
        trace.validation_loss.append(float(validation))
        trace.validation_accuracy.append(100 * float(right[graph.validation].double().mean()))
        trace.test_accuracy.append(100 * float(right[graph.test].double().mean()))


def train(setting: Setting, recipe: Recipe, seed: int, epochs: int) -> Trace:
    """Train a network of a seed, which draws its weights and its dropout, and return what it has shown."""
    trace = Trace()
    devices = [setting.features.device] if setting.features.is_cuda else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        run = Run(setting, recipe, seed, epochs)
        for _ in range(epochs):
            try:
                run.step()
            except FloatingPointError:
                trace.diverged = True
                break
            run.evaluate(trace)
            if not isfinite(trace.validation_loss[-1]):
                trace.diverged = True
                break
    return trace
