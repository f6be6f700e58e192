"""One run of the published protocol: a two-layer graph convolutional network, the whole graph in every step.

The loss at epoch e is the mean over training nodes plus λ(e) times the mean over all others, whose labels are those that
the network predicts in the same pass. It is a weighted cross-entropy: training nodes weigh 1, others
μ = λ N_train/(N − N_train), and the sum of the weights is Ω = N_train (1 + λ).
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import lru_cache
from math import isfinite
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from analyses.gnn_natural_gradient.recipe import Recipe
from analyses.graphs import graph_of
from curvlab.fisher import KFAC
from curvlab.nn import GraphNetwork, Propagation, WeightedCrossEntropy, gcn
from curvlab.optim import Preconditioner
from curvlab.problems import LabelledGraph
from curvlab.study import Diverged, generator, stream

DROPOUT = 0.5
MOMENTUM = 0.9
ACCURACY, VALIDATION, VALIDATION_LOSS = "test_accuracy", "validation_accuracy", "validation_loss"
"""What is seen after every epoch; accuracies in per cent."""


@dataclass(frozen=True, eq=False)
class Setting:
    """A graph on a device, and its features ÂX, which no epoch changes."""

    graph: LabelledGraph
    features: Float[Tensor, "N F"]
    aggregated: Float[Tensor, "N F"]
    labels: Int[Tensor, " N"]
    trains: Bool[Tensor, " N"]

    def drawn(self, seed: int) -> "Setting":
        """Return the graph with nodes drawn by a seed: as many of each class for training, and to validate and test."""
        graph = self.graph
        order = torch.randperm(len(graph.labels), generator=generator(seed, "split"))
        counts = graph.labels[graph.train].bincount(minlength=graph.classes).tolist()
        train = torch.cat([order[graph.labels[order] == label][:count] for label, count in enumerate(counts)])
        rest = order[~torch.isin(order, train)]
        validation, test = rest[: len(graph.validation)], rest[len(graph.validation) :]
        return replace(
            self,
            graph=replace(graph, train=train, validation=validation, test=test),
            trains=torch.zeros_like(self.trains).index_fill_(0, train.to(self.trains.device), value=True),
        )

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


def setting_of(problem: str, split: str, device: str, dtype: str, seed: int) -> Setting:
    """Return a graph on a device, with nodes drawn by the seed if it has no published split."""
    setting = _published(problem, split, device, dtype)
    return setting.drawn(seed) if problem == "karate" else setting


@lru_cache(maxsize=3)
def _published(problem: str, split: str, device: str, dtype: str) -> Setting:
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


def izadi() -> KFAC:
    """Return the paper's structure."""
    return KFAC(sharing="gradient", factored_damping="equal")


class IzadiPreconditioner(Preconditioner):
    """Izadi et al.'s: (A + √ε I)⁻¹ ∇W (G + √ε I)⁻¹ with A = Σ x̄x̄ᵀ/n and G = Σ ggᵀ/n over all nodes.

    `KFAC(sharing="gradient")` divides both factors by Ω, so it is given the damping ε (n/Ω)², and the direction is multiplied
    by (n/Ω)². g is the gradient of the log-likelihood Σ_i w_i ln p_i of which the loss is the mean.
    """

    def __init__(self, model: nn.Module, loss: nn.Module, recipe: Recipe, schedule: Schedule, seed: int) -> None:
        def scale(step: int) -> float:
            return schedule.nodes(step - step % recipe.refresh + 1) ** 2

        self._scale = scale
        super().__init__(
            model,
            loss,
            izadi(),
            kind=recipe.kind,
            damping=lambda step: recipe.epsilon * scale(step),
            decay=0.0,
            kl_clip=None,
            refresh_every=recipe.refresh,
            graph=True,
            seed=seed,
        )

    def precondition(self, scale: Tensor | float | None = None) -> None:
        """Turn gradients into natural ones."""
        nodes = self._scale(self.steps)
        super().precondition(scale)
        for parameter in self.parameters.values():
            if parameter.grad is not None:
                parameter.grad.mul_(nodes)


class TorchDraws:
    """Random numbers of torch from a seed on, which nothing else draws; for layers that take no generator, as dropout."""

    def __init__(self, seed: int, device: torch.device) -> None:
        self._gpus = [device] if device.type == "cuda" else []
        self.states = [torch.Generator(d).manual_seed(seed).get_state() for d in (torch.device("cpu"), *self._gpus)]

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """Context in which they are drawn; torch's own go on after it as before."""
        with torch.random.fork_rng(self._gpus):
            torch.set_rng_state(self.states[0])
            for gpu, state in zip(self._gpus, self.states[1:], strict=True):
                torch.cuda.set_rng_state(state, gpu)
            try:
                yield
            finally:
                self.states = [torch.get_rng_state(), *map(torch.cuda.get_rng_state, self._gpus)]


class GraphTraining:
    """A network, its optimiser and its preconditioner: a process whose steps are epochs.

    Dropout has a stream of its own, whatever other random numbers are drawn meanwhile.
    """

    def __init__(self, setting: Setting, recipe: Recipe, seed: int, epochs: int) -> None:
        self._draws = TorchDraws(stream(seed, "dropout"), setting.features.device)
        self.setting, self.model = setting, setting.network(recipe, seed)
        self._all = torch.arange(len(setting.labels), device=setting.labels.device)
        self._loss = WeightedCrossEntropy(setting.trains.to(setting.features.dtype))
        self._schedule = Schedule(recipe, epochs, setting.others)
        self._natural = (
            IzadiPreconditioner(self.model, self._loss, recipe, self._schedule, stream(seed, "labels"))
            if recipe.kfac
            else None
        )
        self._optimiser: torch.optim.Optimizer = (
            torch.optim.Adam(self.model.parameters(), recipe.lr, weight_decay=recipe.weight_decay)
            if recipe.optimiser == "adam"
            else torch.optim.SGD(self.model.parameters(), recipe.lr, MOMENTUM, weight_decay=recipe.weight_decay)
        )

    def step(self, step: int) -> None:
        """Take the step of an epoch.

        Raises:
            Diverged: the loss before it is not finite.
        """
        weight = self._schedule.in_loss(step + 1)
        if weight:
            labelled = self.setting.trains.to(self.setting.features.dtype)
            self._loss.weights = labelled + (1 - labelled) * (weight / self.setting.others)
        self._optimiser.zero_grad()
        with self._natural.collect() if self._natural is not None and self._natural.due else nullcontext():
            with self._draws():
                outputs = self.model(self._all)
            targets = torch.where(self.setting.trains, self.setting.labels, outputs.detach().argmax(1))
            loss = (1 + weight) * self._loss(outputs, targets)
            if not bool(loss.isfinite()):
                raise Diverged
            loss.backward()
        if self._natural is not None:
            self._natural.precondition()
        self._optimiser.step()

    def look(self, step: int) -> dict[str, float] | None:
        """See the loss and the accuracies after an epoch, without dropout.

        Raises:
            Diverged: the loss is not finite.
        """
        if step == 0:
            return None
        graph, labels = self.setting.graph, self.setting.labels
        self.model.eval()
        with torch.no_grad():
            outputs = self.model(self._all)
        self.model.train()
        right = outputs.argmax(1) == labels
        loss = float(nn.functional.cross_entropy(outputs[graph.validation], labels[graph.validation]))
        if not isfinite(loss):
            raise Diverged
        return {
            VALIDATION_LOSS: loss,
            VALIDATION: 100 * float(right[graph.validation].double().mean()),
            ACCURACY: 100 * float(right[graph.test].double().mean()),
        }

    def state_dict(self) -> dict[str, Any]:
        """Return what the next epoch depends on."""
        return {
            "model": self.model.state_dict(),
            "optimiser": self._optimiser.state_dict(),
            "natural": self._natural and self._natural.state_dict(),
            "draws": self._draws.states,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up what `state_dict` returned."""
        self.model.load_state_dict(state["model"])
        self._optimiser.load_state_dict(state["optimiser"])
        if self._natural is not None:
            self._natural.load_state_dict(state["natural"])
        self._draws.states = state["draws"]
