"""Blocks of random models: each maps `[N, T, D]` to `[N, T, D]`, as people write layers, and most are traps.

Blocks draw their options from `random.Random` and their numbers from torch's default generator. `between` is what a training
loop does to a block between two batches.
"""
# ruff: noqa: ARG002, ARG004  (blocks have one signature)

from dataclasses import dataclass
from random import Random
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint


@dataclass
class Side:
    """What a batch brings besides its samples.

    Attributes:
        missing: `[N]`, samples that are marked as missing.
        shared: `[D]` or `[T, D]`, seen by all samples.
        padding: `[N, T]`, positions that are padding.
    """

    missing: Tensor
    shared: Tensor
    padding: Tensor


class Block(nn.Module):
    """A piece of a random model."""

    def __init__(self, D: int, T: int, draw: Random) -> None:
        super().__init__()
        self.D, self.T = D, T
        self.build(draw)

    def build(self, draw: Random) -> None:
        """Make layers and draw options."""

    def between(self) -> None:
        """Change between the batches."""


BLOCKS: dict[str, type[Block]] = {}
"""All blocks by name."""


def block(kind: type[Block]) -> type[Block]:
    BLOCKS[kind.__name__] = kind
    return kind


# --- ordinary layers --------------------------------------------------------------------------------------------------


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


# --- weights in several places ----------------------------------------------------------------------------------------


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


# --- branches that open after a step ----------------------------------------------------------------------------------


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


# --- samples that meet for some numbers only --------------------------------------------------------------------------


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


# --- what forward does besides ----------------------------------------------------------------------------------------


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


# --- models -----------------------------------------------------------------------------------------------------------


class Model(nn.Module):
    """Blocks between an entrance, of numbers or of tokens, and a head `[N, C]` or `[N, C, T]`."""

    def __init__(self, blocks: list[Block], entrance: nn.Module, head: nn.Linear, way: str) -> None:
        super().__init__()
        self.entrance, self.blocks, self.head, self.way = entrance, nn.ModuleList(blocks), head, way

    def forward(self, x: Tensor, missing: Tensor, shared: Tensor, padding: Tensor) -> Tensor:
        side = Side(missing, shared, padding)
        h = self.entrance(x)
        for one in self.blocks:
            h = one(h, side)
        match self.way:
            case "mean":
                return self.head(h.mean(1))
            case "flatten":
                return self.head(h.flatten(1))
            case "last":
                return self.head(h[:, -1])
            case _:
                return self.head(h).transpose(1, 2)

    def between(self) -> None:
        for one in self.blocks:
            one.between()

    @property
    def description(self) -> str:
        """The model in one line."""

        def options(one: nn.Module) -> str:
            kept = {
                k: v for k, v in vars(one).items() if not k.startswith("_") and k not in ("D", "T", "training", "kept")
            }
            shown = [f"{k}={v}" for k, v in kept.items() if isinstance(v, bool | int | float | str)]
            return f"{type(one).__name__}({', '.join(shown)})"

        return " > ".join([type(self.entrance).__name__, *map(options, self.blocks), f"head:{self.way}"])


def random_model(draw: Random, D: int, T: int, C: int, names: list[str] | None = None) -> Model:
    """Draw a model, of named blocks if given."""
    names = names or draw.choices(list(BLOCKS), k=draw.randint(1, 4))
    way = draw.choices(["mean", "flatten", "last", "positions"], [4, 3, 2, 1])[0]
    entrance = nn.Embedding(6, D) if draw.random() < 0.4 else nn.Linear(D, D)
    blocks = [BLOCKS[name](D, T, draw) for name in names]
    head = nn.Linear(T * D if way == "flatten" else D, C)
    if draw.random() < 0.15:
        nn.init.zeros_(head.weight)
    if draw.random() < 0.1 and len(blocks) > 1:
        blocks.append(blocks[0])
    return Model(blocks, entrance, head, way)
