"""Races by problem: batches, budget, and the loss and accuracy to reach, all fixed before any run."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Target = Literal["loss", "accuracy"]
TARGETS: tuple[Target, ...] = ("loss", "accuracy")


@dataclass(frozen=True)
class Race:
    """What is to be reached, and in how many steps.

    Attributes:
        batch: samples of a step.
        steps: budget of a run.
        every: steps between evaluations, the resolution of every number of steps.
        loss: of the training samples, to be reached.
        accuracy: share of test samples classified right, to be reached.
        exact: structures that are made of all C rows a sample, where the system of N·C rows is affordable; the others have
            one random row a sample, kind `mc`.
        cost: seconds of a step, the mean of all methods, over those on digits-mlp; for estimates of the time only.
    """

    batch: int
    steps: int
    every: int
    loss: float
    accuracy: float
    exact: tuple[str, ...] = ()
    cost: float = 1.0

    def reached(self, target: Target, seen: Mapping[str, float]) -> bool:
        """Whether a target is reached by the loss and the accuracy that were seen."""
        return seen["loss"] <= self.loss if target == "loss" else seen["accuracy"] >= self.accuracy

    def described(self, target: Target) -> str:
        """A target in words."""
        return f"a training loss of {self.loss:g}" if target == "loss" else f"a test accuracy of {self.accuracy:g}"


RACES: Mapping[str, Race] = {
    "digits-mlp": Race(
        batch=64, steps=100, every=1, loss=0.1, accuracy=0.9, exact=("full", "block-diagonal", "unit-wise")
    ),
    "digits-residual": Race(batch=64, steps=200, every=4, loss=0.05, accuracy=0.95, cost=5.0),
    "fashion-lenet": Race(batch=128, steps=600, every=10, loss=0.45, accuracy=0.83, cost=11.0),
    "cifar10-5k-cnn": Race(batch=128, steps=600, every=10, loss=0.9, accuracy=0.55, cost=65.0),
    "characters": Race(batch=32, steps=600, every=20, loss=2.2, accuracy=0.35, cost=15.0),
}
"""By problem. Losses are cross-entropies in nats."""

USUAL = Race(batch=128, steps=500, every=10, loss=0.1, accuracy=0.9, cost=10.0)
"""For a problem of the user's own, where options say nothing else."""
