"""How an optimiser is chosen: by advice, by tuning Adam in the same budget, or by a grid search at ten times the cost."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import inf

from torch import Tensor, nn

from curvlab.advice import Advice, Candidate, advise
from curvlab.advice.race import Clock

DEARER = 10
"""Cost of the grid search over that of an advice."""
ADAM = tuple(Candidate("Adam", {"lr": lr}) for lr in (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1))
SGD = tuple(
    Candidate("SGD", {"lr": lr, "momentum": 0.9}) for lr in (1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0, 3.0)
)  # fmt: skip
NATURAL = tuple(
    Candidate("natural gradient", {"kl_clip": clip, "refresh_every": refresh})
    for clip in (3e-3, 1e-2, 3e-2, 1e-1)
    for refresh in (1, 5)
)
GRID = (*ADAM, *SGD, *NATURAL)


@dataclass(frozen=True, eq=False)
class Task:
    """What an optimiser is chosen for.

    Attributes:
        model: at the weights that all start from.
        loss: the loss.
        batches: to train on.
        graph: whether samples are nodes of one graph.
        clock: tells the time that counts.
    """

    model: nn.Module
    loss: nn.Module
    batches: list[tuple[Tensor, Tensor]]
    graph: bool
    clock: Clock

    def advised(self, seconds: float, candidates: tuple[Candidate, ...] | None = None) -> Advice:
        """Return the advice of a race within some seconds."""
        return advise(
            self.model, self.loss, self.batches, seconds, candidates=candidates, graph=self.graph, clock=self.clock
        )


def advice(task: Task, budget: float) -> Candidate:
    """Choose as `curvlab.advise` does by default."""
    return task.advised(budget).candidate


def adam(task: Task, budget: float) -> Candidate:
    """Choose Adam's learning rate by the same race, among eight."""
    return task.advised(budget, ADAM).candidate


def grid(task: Task, budget: float) -> Candidate:
    """Try every point of a grid for an equal time, from the start, and take the one whose held-out loss is lowest at the end."""

    def loss(candidate: Candidate) -> float:
        try:
            return task.advised(DEARER * budget / len(GRID), (candidate,)).winner.best
        except ValueError:  # it does not train the model
            return inf

    return min(GRID, key=loss)


ARMS: Mapping[str, Callable[[Task, float], Candidate]] = {"advice": advice, "adam": adam, "grid": grid}
"""By name, as `--arms` takes them."""
