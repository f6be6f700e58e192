"""What forward does besides: hooks, lists, writing in place, functions with their own gradients."""
# ruff: noqa: ARG002, ARG004  (blocks have one signature)

from random import Random
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from adversary.block import Block, Side, block


@block
class Hooked(Block):
    """A hook of the user's changes the layer's output, or keeps it."""

    def build(self, draw: Random) -> None:
        self.layer, self.way = nn.Linear(self.D, self.D), draw.choice(["scale", "mix", "keep"])
        self.open, self.kept = draw.random() < 0.5, None
        self.layer.register_forward_hook(self.act)

    def act(self, _: nn.Module, __: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
        if self.way == "keep":
            self.kept = output
            return None
        if not self.open:
            return None
        return 2 * output if self.way == "scale" else output - output.mean(0)

    def forward(self, h: Tensor, side: Side) -> Tensor:
        new = torch.tanh(self.layer(h))
        return new if self.kept is None else new + self.kept

    def between(self) -> None:
        self.open = True


@block
class Listing(Block):
    """Forward appends to a list and counts."""

    def build(self, draw: Random) -> None:
        self.layer, self.log, self.calls = nn.Linear(self.D, self.D), [], 0

    def forward(self, h: Tensor, side: Side) -> Tensor:
        h = torch.tanh(self.layer(h))
        self.log.append(h)
        self.calls += 1
        return h


@block
class InPlace(Block):
    def build(self, draw: Random) -> None:
        self.layer, self.way = nn.Linear(self.D, self.D), draw.choice(["tanh", "add", "write"])

    def forward(self, h: Tensor, side: Side) -> Tensor:
        new = self.layer(h)
        match self.way:
            case "tanh":
                return new.tanh_()
            case "add":
                return new.sin().add_(h)
            case _:
                new = new.clone()
                new[:, 0] = h[:, 0]
                return new


@block
class Checkpointed(Block):
    def build(self, draw: Random) -> None:
        self.layer = nn.Linear(self.D, self.D)

    def forward(self, h: Tensor, side: Side) -> Tensor:
        return checkpoint(lambda x: torch.tanh(self.layer(x)), h, use_reentrant=False)


class Doubled(torch.autograd.Function):
    """`2x`, without rules for vmap and forward mode."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return 2 * gradient


class Mixed(torch.autograd.Function):
    """`x` with a share of its mean over the batch added."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, share: float) -> Tensor:
        ctx.share = share
        return x + share * x.mean(0)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient + ctx.share * gradient.mean(0), None


@block
class OwnFunction(Block):
    def build(self, draw: Random) -> None:
        self.layer, self.way, self.share = nn.Linear(self.D, self.D), draw.choice(["doubled", "mixed"]), 0.0

    def forward(self, h: Tensor, side: Side) -> Tensor:
        new = torch.tanh(self.layer(h))
        return Doubled.apply(new) if self.way == "doubled" else Mixed.apply(new, self.share)

    def between(self) -> None:
        self.share = 0.5
