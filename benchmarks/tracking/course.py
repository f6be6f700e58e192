"""Training runs along which eigenvalues are tracked: full-batch gradient descent, recorded once for all methods."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.utils import parameters_to_vector

from curvlab.problems import Problem
from curvlab.problems.full_batch import full_batch_problem

RunName = Literal["digits", "readme"]


@dataclass(frozen=True, kw_only=True)
class Run:
    """Gradient descent on a tanh network of three layers, ½-MSE.

    Attributes:
        images: an image set of ten classes.
        scaling: of its pixels, see `full_batch_problem`.
        samples: training samples N.
        width: hidden units of each of the two hidden layers.
        eta: step size η.
        steps: steps of the run.
        every: steps from one measurement to the next.
    """

    images: str
    scaling: Literal["standardised", "unit"]
    samples: int
    width: int
    eta: float
    steps: int
    every: int


RUNS: Mapping[RunName, Run] = {
    "digits": Run(images="digits", scaling="unit", samples=500, width=256, eta=0.5, steps=1000, every=50),
    "readme": Run(
        images="cifar10-5k", scaling="standardised", samples=5000, width=200, eta=0.01, steps=5000, every=100
    ),
}
"""Runs by name. Both end at the edge of stability; `readme` is the run of the published code's README (Cohen et al. 2021),
its two eigenvalues every 100 steps, until some 650 steps past the edge."""


def problem(run: Run, device: str) -> Problem:
    """Return network and data in float32 on a device.

    Raises:
        DataUnavailable: the images are absent.
    """
    made = full_batch_problem(
        run.images, samples=run.samples, width=run.width, scaling=run.scaling, dtype=torch.float32
    )
    return made.to(device, torch.float32)


def record(run: Run, device: str) -> Float[Tensor, "M P"]:
    """Train, and return the parameters at every measurement, in the host's memory."""
    made = problem(run, device)
    model, (inputs, targets) = made.model, made.train
    optimiser = torch.optim.SGD(model.parameters(), lr=run.eta)
    seen = []
    for step in range(run.steps + 1):
        if step % run.every == 0:
            seen.append(parameters_to_vector(model.parameters()).detach().cpu())
        optimiser.zero_grad()
        made.loss(model(inputs), targets).backward()
        optimiser.step()
    return torch.stack(seen)
