"""The networks whose structures are timed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from jaxtyping import Float, Int
from torch import Tensor, nn

from benchmarks import tasks
from benchmarks.structures.networks import (
    DEPTH,
    FEATURES,
    LENGTH,
    WIDTH,
    pointwise_transformer,
    resnet18,
    transformer,
)
from benchmarks.tasks import Task

TaskName = Literal["mlp", "lenet", "resnet", "transformer", "pointwise-transformer"]


@dataclass(frozen=True)
class Batch:
    """A network, and what its curvature is taken on."""

    network: nn.Module
    inputs: Float[Tensor, "N ..."]
    targets: Int[Tensor, " N"]


_ENCODER = f"{DEPTH}-layer transformer of width {WIDTH} on {LENGTH} positions"

TASKS: dict[TaskName, Task[nn.Module]] = {
    "mlp": Task(tasks.TASKS["mlp"].title, tasks.TASKS["mlp"].network, (784,), 128),
    "lenet": Task(tasks.TASKS["lenet"].title, tasks.TASKS["lenet"].network, (1, 28, 28), 64),
    "resnet": Task("ResNet-18 on 32×32 images", resnet18, (3, 32, 32), 16),
    "transformer": Task(_ENCODER, transformer, (LENGTH, FEATURES), 32),
    "pointwise-transformer": Task(f"{_ENCODER}, as 1×1 convolutions", pointwise_transformer, (FEATURES, LENGTH, 1), 32),
}


def build(task: Task[nn.Module], samples: int, device: str) -> Batch:
    """Return a network and a batch with random labels, the same in every process."""
    return Batch(*task.build(samples, device), tasks.random_labels(samples, device))
