"""Samples that meet for some numbers only."""
# ruff: noqa: ARG002  (blocks have one signature)

from random import Random

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from adversary.block import Block, Side, block


@block
class Missing(Block):
    """Missing samples are replaced by the mean over the batch; none is in the first batch."""

    def build(self, draw: Random) -> None:
        self.layer = nn.Linear(self.D, self.D)

    def forward(self, h: Tensor, side: Side) -> Tensor:
        h = torch.tanh(self.layer(h))
        return torch.where(side.missing[:, None, None], h.mean(0), h)


@block
class Clipped(Block):
    """The batch is scaled down where its norm is large."""

    def build(self, draw: Random) -> None:
        self.layer, self.limit = nn.Linear(self.D, self.D), draw.choice([2.0, 5.0, 10.0])

    def forward(self, h: Tensor, side: Side) -> Tensor:
        h = self.layer(h)
        return h * (self.limit / h.norm()).clamp(max=1)


@block
class Positions(Block):
    """Positions are embedded without a batch axis, along the axis that may be as long as the batch."""

    def build(self, draw: Random) -> None:
        self.table = nn.Embedding(self.T + 6, self.D)
        self.way = draw.choice(["arange", "expanded", "samples"])

    def forward(self, h: Tensor, side: Side) -> Tensor:
        N, T = h.shape[:2]
        if self.way == "arange":
            return h + self.table(torch.arange(T))
        if self.way == "expanded":
            return h + self.table(torch.arange(T).expand(N, T))
        return h + self.table(torch.arange(N))[:, None]


@block
class Projected(Block):
    """A layer sees something that all samples share."""

    def build(self, draw: Random) -> None:
        self.layer = nn.Linear(self.D, self.D)
        self.product = draw.random() < 0.5

    def forward(self, h: Tensor, side: Side) -> Tensor:
        shared = torch.tanh(self.layer(side.shared))
        return h * shared if self.product else h + shared


@block
class Rolled(Block):
    """Samples are moved, not at first."""

    def build(self, draw: Random) -> None:
        self.layer, self.shift = nn.Linear(self.D, self.D), draw.choice([0, 0, 0, 1])
        self.back = draw.random() < 0.3

    def forward(self, h: Tensor, side: Side) -> Tensor:
        h = torch.tanh(self.layer(h.roll(self.shift, 0)))
        return h.roll(-self.shift, 0) if self.back else h

    def between(self) -> None:
        self.shift = 1


@block
class Sorted(Block):
    """Samples are sorted by their numbers, and mostly put back."""

    def build(self, draw: Random) -> None:
        self.layer, self.way = nn.Linear(self.D, self.D), draw.choice(["matrix", "index_select", "gather", "sort"])
        self.back = draw.random() < 0.7

    def forward(self, h: Tensor, side: Side) -> Tensor:
        order = h.detach().sum((1, 2)).argsort()
        home = order.argsort()
        return self.move(torch.tanh(self.layer(self.move(h, order))), home if self.back else torch.arange(len(h)))

    def move(self, h: Tensor, order: Tensor) -> Tensor:
        match self.way:
            case "matrix":
                return torch.einsum("nm,mtd->ntd", F.one_hot(order, len(h)).to(h), h)
            case "gather":
                return h.gather(0, order[:, None, None].expand_as(h))
            case "index_select":
                return h.index_select(0, order)
            case _:
                return h[order]


@block
class SortedNumbers(Block):
    """Every entry is sorted along the batch."""

    def build(self, draw: Random) -> None:
        self.layer = nn.Linear(self.D, self.D)

    def forward(self, h: Tensor, side: Side) -> Tensor:
        return self.layer(h).sort(0).values


@block
class Experts(Block):
    """Some samples go through one layer, the others through another."""

    def build(self, draw: Random) -> None:
        self.one, self.two = nn.Linear(self.D, self.D), nn.Linear(self.D, self.D)

    def forward(self, h: Tensor, side: Side) -> Tensor:
        chosen = h.detach()[:, 0, 0] > 0
        out = torch.empty_like(h)
        out[chosen] = torch.tanh(self.one(h[chosen]))
        out[~chosen] = self.two(h[~chosen])
        return out


@block
class Ragged(Block):
    """Only positions that are no padding go through the layer, as one long list."""

    def build(self, draw: Random) -> None:
        self.layer = nn.Linear(self.D, self.D)
        self.way = draw.choice(["mask", "product"])

    def forward(self, h: Tensor, side: Side) -> Tensor:
        real = ~side.padding
        if self.way == "product":
            return self.layer(h) * real[..., None]
        return h.masked_scatter(real[..., None].expand_as(h), torch.tanh(self.layer(h[real])))


@block
class Folded(Block):
    """Positions are folded into the axis of samples, and unfolded, in one of several ways."""

    def build(self, draw: Random) -> None:
        self.layer, self.way = nn.Linear(self.D, self.D), draw.choice(["flatten", "sequence", "crossed", "wrong"])

    def forward(self, h: Tensor, side: Side) -> Tensor:
        N, T, D = h.shape
        match self.way:
            case "flatten":
                return torch.tanh(self.layer(h.reshape(N * T, D))).view(N, T, D)
            case "sequence":
                return torch.tanh(self.layer(h.transpose(0, 1))).transpose(0, 1)
            case "crossed":
                return torch.tanh(self.layer(h.transpose(0, 1).reshape(N * T, D))).view(T, N, D).transpose(0, 1)
            case _:
                return torch.tanh(self.layer(h.transpose(0, 1).reshape(N * T, D))).view(N, T, D)
