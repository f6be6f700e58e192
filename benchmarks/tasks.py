"""The networks whose Gram matrices are timed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

TaskName = Literal["mlp", "lenet"]


@dataclass(frozen=True)
class Task:
    """The Gram matrix `J Jᵀ` of a network with 10 outputs, in float32.

    Attributes:
        title: what is computed, for headings.
        network: builds the network, a chain of modules.
        input_shape: shape of one sample.
        samples: number of samples N.
    """

    title: str
    network: Callable[[], nn.Sequential]
    input_shape: tuple[int, ...]
    samples: int

    def build(self, samples: int, device: str) -> tuple[nn.Sequential, Float[Tensor, "N ..."]]:
        """Return the network and its inputs: the same numbers in every process and on every device."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            network, inputs = self.network(), torch.randn(samples, *self.input_shape)
        return network.to(device), inputs.to(device)


def _mlp() -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(784, 1024), nn.ReLU(),
        nn.Linear(1024, 1024), nn.ReLU(),
        nn.Linear(1024, 10),
    )  # fmt: skip


def _lenet() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, 6, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(6, 16, 5), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(400, 120), nn.ReLU(),
        nn.Linear(120, 84), nn.ReLU(),
        nn.Linear(84, 10),
    )  # fmt: skip


TASKS: dict[TaskName, Task] = {
    "mlp": Task("784-1024-1024-10 ReLU MLP", _mlp, (784,), 128),
    "lenet": Task("LeNet on 28×28 images", _lenet, (1, 28, 28), 64),
}
