"""The networks that are timed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, Literal, TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

TaskName = Literal["mlp", "lenet"]

Network = TypeVar("Network", bound=nn.Module)


@dataclass(frozen=True)
class Task(Generic[Network]):
    """A network with 10 outputs and its inputs, in float32.

    Attributes:
        title: the network in words.
        network: builds it.
        input_shape: shape of one sample.
        samples: number of samples N.
    """

    title: str
    network: Callable[[], Network]
    input_shape: tuple[int, ...]
    samples: int

    def build(self, samples: int, device: str) -> tuple[Network, Float[Tensor, "N ..."]]:
        """Return the network and its inputs: the same numbers in every process and on every device."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            network, inputs = self.network(), torch.randn(samples, *self.input_shape)
        return network.to(device), inputs.to(device)


def random_labels(samples: int, device: str) -> Int[Tensor, " N"]:
    """Return one of ten classes for every sample, the same in every process."""
    return torch.randint(10, (samples,), generator=torch.Generator().manual_seed(1)).to(device)


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


TASKS: dict[TaskName, Task[nn.Sequential]] = {
    "mlp": Task("784-1024-1024-10 ReLU MLP", _mlp, (784,), 128),
    "lenet": Task("LeNet on 28×28 images", _lenet, (1, 28, 28), 64),
}
