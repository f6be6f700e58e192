"""Ordinary layers."""
# ruff: noqa: ARG002  (blocks have one signature)

from random import Random

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from adversary.block import Block, Side, block


@block
class Dense(Block):
    def build(self, draw: Random) -> None:
        self.layer = nn.Linear(self.D, self.D, bias=draw.random() < 0.7)
        self.residual = draw.random() < 0.5

    def forward(self, h: Tensor, side: Side) -> Tensor:
        new = torch.tanh(self.layer(h))
        return h + new if self.residual else new


@block
class Convolution(Block):
    def build(self, draw: Random) -> None:
        self.layer = nn.Conv1d(self.D, self.D, 3, padding=1, groups=draw.choice([1, self.D]))

    def forward(self, h: Tensor, side: Side) -> Tensor:
        return F.softplus(self.layer(h.transpose(1, 2))).transpose(1, 2)


@block
class LayerNorm(Block):
    def build(self, draw: Random) -> None:
        self.layer = nn.LayerNorm(self.D)

    def forward(self, h: Tensor, side: Side) -> Tensor:
        return self.layer(h)


@block
class BatchNorm(Block):
    def build(self, draw: Random) -> None:
        self.layer = nn.BatchNorm1d(self.D)
        self.layer.running_mean.normal_()
        self.layer.running_var.uniform_(0.5, 2)
        self.layer.train(draw.random() < 0.2)
        self.trains_later = draw.random() < 0.1

    def forward(self, h: Tensor, side: Side) -> Tensor:
        return self.layer(h.transpose(1, 2)).transpose(1, 2)

    def between(self) -> None:
        if self.trains_later:
            self.layer.train()


@block
class Slopes(Block):
    def build(self, draw: Random) -> None:
        self.layer = nn.PReLU(draw.choice([1, self.T]))

    def forward(self, h: Tensor, side: Side) -> Tensor:
        return self.layer(h)


@block
class Scale(Block):
    def build(self, draw: Random) -> None:
        self.scale = nn.Parameter(torch.randn(draw.choice([(), (self.D,), (self.T, self.D), (self.T, 1)])))

    def forward(self, h: Tensor, side: Side) -> Tensor:
        return h * self.scale


@block
class Attention(Block):
    def build(self, draw: Random) -> None:
        self.layer = nn.MultiheadAttention(self.D, 1, batch_first=draw.random() < 0.5)
        self.forgets_to_transpose = draw.random() < 0.2
        self.masked = draw.random() < 0.3

    def forward(self, h: Tensor, side: Side) -> Tensor:
        mask = side.padding if self.masked and not self.forgets_to_transpose else None
        if self.layer.batch_first or self.forgets_to_transpose:
            mask = mask if self.layer.batch_first else None
            return h + self.layer(h, h, h, key_padding_mask=mask, need_weights=False)[0]
        s = h.transpose(0, 1)
        return h + self.layer(s, s, s, key_padding_mask=mask, need_weights=False)[0].transpose(0, 1)


@block
class Recurrent(Block):
    def build(self, draw: Random) -> None:
        self.layer = nn.GRU(self.D, self.D, batch_first=draw.random() < 0.5)

    def forward(self, h: Tensor, side: Side) -> Tensor:
        if self.layer.batch_first:
            return self.layer(h)[0]
        return self.layer(h.transpose(0, 1))[0].transpose(0, 1)


@block
class Dropout(Block):
    def build(self, draw: Random) -> None:
        self.layer, self.drop = nn.Linear(self.D, self.D), nn.Dropout(0.0).train()

    def forward(self, h: Tensor, side: Side) -> Tensor:
        return self.drop(torch.tanh(self.layer(h)))
