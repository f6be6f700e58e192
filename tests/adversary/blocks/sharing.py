"""Weights in several places."""
# ruff: noqa: ARG002  (blocks have one signature)

from random import Random

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from adversary.block import Block, Side, block


@block
class WeightAgain(Block):
    """A layer whose weight is used once more, past the layer."""

    def build(self, draw: Random) -> None:
        self.layer = nn.Linear(self.D, self.D)
        self.way = draw.choice(["linear", "transposed", "norm", "bias"])
        self.gate = nn.Parameter(torch.tensor(draw.choice([0.0, 1.0, 1e-4])))

    def forward(self, h: Tensor, side: Side) -> Tensor:
        new = torch.tanh(self.layer(h))
        if self.way == "linear":
            return new + self.gate * F.linear(h, self.layer.weight)
        if self.way == "transposed":
            return new + self.gate * (new @ self.layer.weight)
        if self.way == "norm":
            return new * (1 + self.gate * self.layer.weight.square().sum())
        return new + self.gate * self.layer.bias


@block
class Twice(Block):
    """A module that is called twice, under two names."""

    def build(self, draw: Random) -> None:
        self.one = nn.Linear(self.D, self.D)
        if draw.random() < 0.5:
            self.two = self.one
        else:
            self.two = nn.Linear(self.D, self.D)
            self.two.weight = self.one.weight
        self.gate = draw.choice([0.0, 1.0])

    def forward(self, h: Tensor, side: Side) -> Tensor:
        new = torch.tanh(self.one(h))
        return new + self.gate * self.two(new)

    def between(self) -> None:
        self.gate = 1.0


@block
class LateCall(Block):
    """A layer that is called once more from the second batch on."""

    def build(self, draw: Random) -> None:
        self.layer, self.again = nn.Linear(self.D, self.D), False

    def forward(self, h: Tensor, side: Side) -> Tensor:
        h = torch.tanh(self.layer(h))
        return torch.tanh(self.layer(h)) if self.again else h

    def between(self) -> None:
        self.again = True
