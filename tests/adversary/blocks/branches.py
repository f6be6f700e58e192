"""Branches that open after a step."""
# ruff: noqa: ARG002  (blocks have one signature)

from random import Random
from typing import Any

import torch
from torch import Tensor, nn

from adversary.block import Block, Side, block


def mixed(h: Tensor, way: str) -> Tensor:
    """Let samples see each other."""
    match way:
        case "mean":
            return h.mean(0, keepdim=True).expand_as(h)
        case "roll":
            return h.roll(1, 0)
        case "flip":
            return h.flip(0)
        case "norm":
            return h * h.norm()
        case "softmax":
            return h.softmax(0)
        case "cumsum":
            return h.cumsum(0)
        case "similarity":
            return torch.einsum("nm,mtd->ntd", (h.flatten(1) @ h.flatten(1).T).softmax(1), h)
        case _:
            return h.tanh()


MIXING = ["none", "mean", "roll", "flip", "norm", "softmax", "cumsum", "similarity"]


@block
class ZeroHead(Block):
    """A branch that ends in a layer of zeros."""

    def build(self, draw: Random) -> None:
        self.inner, self.outer = nn.Linear(self.D, self.D), nn.Linear(self.D, self.D)
        nn.init.zeros_(self.outer.weight)
        self.mixing = draw.choice(MIXING)

    def forward(self, h: Tensor, side: Side) -> Tensor:
        return h + self.outer(mixed(torch.tanh(self.inner(h)), self.mixing))


@block
class ReZero(Block):
    """A branch behind a gate that is a parameter and starts at zero."""

    def build(self, draw: Random) -> None:
        self.layer, self.alpha = nn.Linear(self.D, self.D), nn.Parameter(torch.zeros(draw.choice([(), (self.D,)])))
        self.mixing = draw.choice(MIXING)

    def forward(self, h: Tensor, side: Side) -> Tensor:
        return h + self.alpha * mixed(torch.tanh(self.layer(h)), self.mixing)


@block
class Gate(Block):
    """A branch behind a gate that is a buffer or an attribute, opened by the training loop."""

    gate: Any

    def build(self, draw: Random) -> None:
        self.layer = nn.Linear(self.D, self.D)
        self.way = draw.choice(["buffer", "attribute", "branch"])
        if self.way == "buffer":
            self.register_buffer("gate", torch.zeros(()))
        else:
            self.gate = 0.0
        self.mixing = draw.choice(MIXING)

    def forward(self, h: Tensor, side: Side) -> Tensor:
        new = torch.tanh(self.layer(h))
        if self.way == "branch" and not self.gate:
            return h + new
        return h + new + self.gate * mixed(new, self.mixing)

    def between(self) -> None:
        if self.way == "buffer":
            self.gate.fill_(1.0)
        else:
            self.gate = 1.0


@block
class SmallBranch(Block):
    """A branch that is small beside the rest."""

    def build(self, draw: Random) -> None:
        self.layer, self.mixing = nn.Linear(self.D, self.D), draw.choice(MIXING)
        self.scale = draw.choice([1e-2, 1e-4])

    def forward(self, h: Tensor, side: Side) -> Tensor:
        return h + self.scale * mixed(torch.tanh(self.layer(h)), self.mixing)
