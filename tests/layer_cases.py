"""Networks of the layers that BackPACK's chains do not cover, or cover in part, and one of the style of GPT-2."""

from dataclasses import dataclass
from typing import Any

import torch
from oracle import CLASSES, DOUBLE, Architecture, chain, freeze, head, indices, vectors
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import orthogonal, spectral_norm, weight_norm


class Two(nn.Module):
    """A bilinear layer of two parts of the input, one given by keyword."""

    def __init__(self) -> None:
        super().__init__()
        self.mix, self.last = nn.Bilinear(2, 3, 4), nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        left, right = x.split([2, 3], dim=-1)
        return self.last(torch.tanh(self.mix(input2=right, input1=left)).sum(1))


class Bags(nn.Module):
    def __init__(self, *, weighted: bool = False, **options: Any) -> None:
        super().__init__()
        self.bag, self.last, self.weighted = nn.EmbeddingBag(5, 4, **options), nn.Linear(4, CLASSES), weighted

    def forward(self, x: Tensor) -> Tensor:
        weights = torch.linspace(0.5, 2, x.numel(), dtype=DOUBLE).view_as(x) if self.weighted else None
        return self.last(torch.tanh(self.bag(x, per_sample_weights=weights)))


class SelfAttention(nn.Module):
    """Attention of a sequence to itself, with the masks that there are."""

    def __init__(self, *, need_weights: bool = False, padded: bool = False, **options: Any) -> None:
        super().__init__()
        self.embedding, self.attend = nn.Embedding(6, 4), nn.MultiheadAttention(4, 2, **options)
        self.last, self.need_weights, self.padded = nn.Linear(4, CLASSES), need_weights, padded

    def forward(self, tokens: Tensor) -> Tensor:
        h, T = self.embedding(tokens), tokens.shape[1]
        causal = torch.ones(T, T, dtype=torch.bool).triu(1) if self.padded else None
        beyond = torch.cat([tokens[:, :1] < 0, tokens[:, 1:] == 0], 1) if self.padded else None
        x = h if self.attend.batch_first else h.transpose(0, 1)
        y, weights = self.attend(
            x, x, x, attn_mask=causal, key_padding_mask=beyond, need_weights=self.need_weights, is_causal=self.padded
        )
        y = y if self.attend.batch_first else y.transpose(0, 1)
        z = self.last(h + y)
        return z.sum(1) if weights is None else z.sum(1) + weights.square().sum((1, 2))[:, None]


class CrossAttention(nn.Module):
    """Attention to another sequence: keys and values are one tensor, or two, or of sizes of their own."""

    def __init__(self, form: str, **options: Any) -> None:
        super().__init__()
        self.attend, self.last = nn.MultiheadAttention(4, 2, batch_first=True, **options), nn.Linear(4, CLASSES)
        self.form = form

    def forward(self, x: Tensor) -> Tensor:
        queries, memory = x[:, :3], x[:, 3:]
        keys_values = {
            "one": lambda: (memory, memory),
            "two": lambda: (memory, torch.tanh(memory)),
            "sizes": lambda: (memory[..., :3], memory[..., 1:3]),
        }
        mask = (x[:, :3, :1] * x[:, None, 3:, 0]).repeat_interleave(2, 0) if self.form == "two" else None
        return self.last(self.attend(queries, *keys_values[self.form](), attn_mask=mask, need_weights=False)[0]).sum(1)


class Translator(nn.Module):
    """`nn.Transformer`: encoder and decoder layers, masks, two inputs."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.table = nn.Embedding(6, 4)
        self.body = nn.Transformer(4, 2, 1, 1, 5, batch_first=True, **options)
        self.last = nn.Linear(4, CLASSES)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(target.shape[1], dtype=DOUBLE)
        h = self.body(self.table(source), self.table(target), tgt_mask=mask, tgt_is_causal=True)
        return self.last(h).mean(1)


class Encoder(nn.Module):
    def __init__(self, *, norm_first: bool, tokens: int = 6) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(4, 2, 5, batch_first=True, norm_first=norm_first, activation="gelu")
        self.table = nn.Embedding(tokens, 4)
        self.body = nn.TransformerEncoder(layer, 2, enable_nested_tensor=not norm_first)
        self.last = nn.Linear(4, CLASSES)

    def forward(self, tokens: Tensor) -> Tensor:
        padding = torch.cat([tokens[:, :1] < 0, tokens[:, 1:] == 0], 1)
        h = self.body(self.table(tokens), src_key_padding_mask=padding)
        return self.last(h[:, 0])


class Recurrent(nn.Module):
    """A recurrent network on `[N, T, 3]`, its outputs and last states."""

    def __init__(self, kind: type[nn.RNNBase], *, given: bool = False, **options: Any) -> None:
        super().__init__()
        self.net, self.given = kind(3, 4, **options), given
        width = (options.get("proj_size") or 4) * (2 if options.get("bidirectional") else 1)
        self.last = nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        shape = (self.net.num_layers * (2 if self.net.bidirectional else 1), len(x), 4)
        h = torch.linspace(-1, 1, torch.Size(shape).numel(), dtype=DOUBLE).view(len(x), shape[0], 4).transpose(0, 1)
        h = x[:, 0, :1] * h + 0.1
        states = ((h, h.square()) if isinstance(self.net, nn.LSTM) else h) if self.given else None
        y, end = self.net(x if self.net.batch_first else x.transpose(0, 1), states)
        y = y if self.net.batch_first else y.transpose(0, 1)
        extra = sum(state.square().sum((0, 2)) for state in (end if isinstance(end, tuple) else (end,)))
        return self.last(y).sum(1) + extra[:, None]


class Cells(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.gru, self.rnn = (
            nn.LSTMCell(3, 4),
            nn.GRUCell(4, 4, bias=False),
            nn.RNNCell(4, 4, nonlinearity="relu"),
        )
        self.last = nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        state, h, s = None, None, None
        for now in x.unbind(1):
            state = self.lstm(now, state)
            h = self.gru(state[0], h)
            s = self.rnn(h, s)
        return self.last(s)


class SharedTable(nn.Module):
    """A table that is looked up twice and used as the output layer without a module, beside shared positions."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.place = nn.Embedding(6, 4), nn.Embedding(5, 4)
        self.mix = nn.Linear(4, 4)

    def forward(self, tokens: Tensor) -> Tensor:
        h = self.table(tokens) + self.table(tokens.flip(1)) + self.place(torch.arange(tokens.shape[1])[None])
        return F.linear(torch.tanh(self.mix(h)), self.table.weight[:CLASSES]).mean(1)


class TiedBias(nn.Module):
    """A convolution used twice, and layers that share one of their two parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.one, self.two = nn.Conv1d(2, 2, 3, padding=1), nn.Linear(4, 4), nn.Linear(4, 4)
        self.three, self.last = nn.Linear(3, 4, bias=False), nn.Linear(4, CLASSES)
        self.two.bias, self.three.bias = self.one.bias, self.one.bias

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv(torch.tanh(self.conv(x)))
        h = torch.tanh(self.one(h)) * self.two(h) + self.three(h[..., :3])
        return self.last(h).sum(1)


class InputFirst(nn.Module):
    """A linear layer with its weight `[in, out]`, as in GPT-2."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(inputs, outputs)), nn.Parameter(torch.randn(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x.flatten(0, -2), self.weight).view(*x.shape[:-1], -1)


@dataclass
class LanguageOutput:
    logits: Tensor
    states: tuple[Tensor, ...]


class LanguageModel(nn.Module):
    """A decoder in the style of GPT-2: keyword inputs, a dataclass of outputs, a head tied to the table of tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.places, self.norm = nn.Embedding(5, 4), nn.Embedding(4, 4), nn.LayerNorm(4)
        self.attend, self.project, self.head = InputFirst(4, 12), InputFirst(4, 4), nn.Linear(4, 5, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> LanguageOutput:
        T = input_ids.shape[1]
        h = self.tokens(input_ids) + self.places(torch.arange(T)[None])
        q, k, v = (x.unflatten(-1, (2, 2)).transpose(1, 2) for x in self.attend(self.norm(h)).chunk(3, dim=-1))
        mask = torch.ones(T, T, dtype=torch.bool).tril() & attention_mask[:, None, None].bool()
        y = F.scaled_dot_product_attention(q, k, v, mask)
        h = h + self.project(y.transpose(1, 2).flatten(2))
        return LanguageOutput(self.head(h), (h,))


def language_inputs(N: int) -> dict[str, Tensor]:
    tokens = torch.randint(5, (N, 4))
    return {"input_ids": tokens, "attention_mask": (torch.arange(4) < 2 + torch.arange(N)[:, None] % 3).long()}


LAYERS: list[Architecture] = [
    Architecture(
        "conv3d",
        lambda: chain(nn.Conv3d(2, 4, 2, stride=(1, 2, 1), groups=2), nn.Tanh(), *head(48)),
        vectors(2, 3, 4, 4),
    ),
    Architecture(
        "conv3d-same",
        lambda: chain(nn.Conv3d(1, 2, 3, padding="same", dilation=(1, 2, 1), padding_mode="circular"), *head(54)),
        vectors(1, 3, 3, 3),
        chain=False,
    ),
    Architecture(
        "transposed1d",
        lambda: chain(
            nn.ConvTranspose1d(4, 6, 3, stride=2, padding=3, dilation=2, groups=2, output_padding=1),
            nn.Tanh(),
            *head(36),
        ),
        vectors(4, 4),
    ),
    Architecture(
        "transposed2d",
        lambda: chain(
            nn.ConvTranspose2d(2, 3, (2, 3), stride=(1, 3), padding=(0, 1), output_padding=(0, 2)),
            nn.Tanh(),
            nn.ConvTranspose2d(3, 1, 2, bias=False),
            *head(50),
        ),
        vectors(2, 3, 3),
    ),
    Architecture(
        "transposed3d", lambda: chain(nn.ConvTranspose3d(2, 2, 2, stride=(2, 1, 1)), *head(72)), vectors(2, 2, 2, 2)
    ),
    Architecture(
        "batchnorm3d", lambda: chain(nn.BatchNorm3d(2), nn.Tanh(), *head(16)), vectors(2, 2, 2, 2), chain=False
    ),
    Architecture(
        "groupnorm",
        lambda: chain(nn.GroupNorm(2, 4), nn.Conv1d(4, 4, 2, bias=False), nn.GroupNorm(4, 4), nn.Tanh(), *head(12)),
        vectors(4, 4),
        chain=False,
    ),
    Architecture(
        "groupnorm-flat", lambda: chain(nn.Linear(4, 4), nn.GroupNorm(2, 4), *head(4)), vectors(4), chain=False
    ),
    Architecture(
        "instancenorm1d",
        lambda: chain(
            nn.InstanceNorm1d(2, affine=True), nn.Conv1d(2, 3, 2, bias=False), nn.InstanceNorm1d(3), *head(12)
        ),
        vectors(2, 5),
        chain=False,
    ),
    Architecture(
        "instancenorm2d-tracked",
        lambda: chain(nn.InstanceNorm2d(2, affine=True, track_running_stats=True), nn.Tanh(), *head(18)),
        vectors(2, 3, 3),
        chain=False,
    ),
    Architecture(
        "instancenorm3d", lambda: chain(nn.InstanceNorm3d(2, affine=True), *head(16)), vectors(2, 2, 2, 2), chain=False
    ),
    Architecture(
        "rmsnorm",
        lambda: chain(nn.RMSNorm((3, 4), eps=0.1), nn.Linear(4, 2), nn.RMSNorm(2), *head(6)),
        vectors(3, 4),
        chain=False,
    ),
    Architecture(
        "prelu",
        lambda: chain(nn.Linear(4, 5), nn.PReLU(), nn.Unflatten(1, (5, 1)), nn.PReLU(5), *head(5)),
        vectors(4),
        chain=False,
    ),
    Architecture("bilinear", Two, vectors(2, 5), chain=False),
    Architecture("bag", lambda: Bags(mode="sum", weighted=True), indices(5, 4), chain=False),
    Architecture("bag-mean", lambda: Bags(mode="mean", padding_idx=1), indices(5, 4), chain=False),
    Architecture("self-attention", lambda: SelfAttention(batch_first=True), indices(6, 3), chain=False),
    Architecture("self-attention-masks", lambda: SelfAttention(padded=True, bias=False), indices(6, 3), chain=False),
    Architecture(
        "self-attention-weights",
        lambda: SelfAttention(need_weights=True, padded=True, add_bias_kv=True, add_zero_attn=True),
        indices(6, 3),
        chain=False,
    ),
    Architecture("cross-attention", lambda: CrossAttention("one"), vectors(5, 4), chain=False),
    Architecture("cross-attention-two", lambda: CrossAttention("two"), vectors(5, 4), chain=False),
    Architecture("cross-attention-sizes", lambda: CrossAttention("sizes", kdim=3, vdim=2), vectors(5, 4), chain=False),
    Architecture("encoder", lambda: Encoder(norm_first=False), indices(6, 3), chain=False),
    Architecture("encoder-norm-first", lambda: Encoder(norm_first=True), indices(6, 3), chain=False),
    Architecture("transformer", Translator, lambda N: (indices(6, 3)(N), indices(6, 2)(N)), chain=False),
    Architecture("lstm", lambda: Recurrent(nn.LSTM, batch_first=True), vectors(3, 3), chain=False),
    Architecture(
        "lstm-all",
        lambda: Recurrent(nn.LSTM, num_layers=2, bidirectional=True, proj_size=2, bias=False),
        vectors(3, 3),
        chain=False,
    ),
    Architecture(
        "gru", lambda: Recurrent(nn.GRU, given=True, num_layers=2, bidirectional=True), vectors(3, 3), chain=False
    ),
    Architecture("lstm-states", lambda: Recurrent(nn.LSTM, given=True, batch_first=True), vectors(2, 3), chain=False),
    Architecture("rnn", lambda: Recurrent(nn.RNN, nonlinearity="relu"), vectors(3, 3), chain=False),
    Architecture("cells", Cells, vectors(3, 3), chain=False),
    Architecture(
        "frozen-lstm",
        lambda: freeze(Recurrent(nn.LSTM, batch_first=True), "net.weight_ih_l0", "net.bias_hh_l0"),
        vectors(3, 3),
        chain=False,
    ),
    Architecture(
        "language-model",
        LanguageModel,
        language_inputs,
        chain=False,
        output=lambda found: found.logits.mT,
        pick=lambda found: found.logits.mT,
    ),
    Architecture("shared-table", SharedTable, indices(6, 5), chain=False),
    Architecture("tied-bias", TiedBias, vectors(2, 4), chain=False),
    Architecture(
        "weight-norm",
        lambda: chain(weight_norm(nn.Linear(4, 5)), nn.Tanh(), weight_norm(nn.Linear(5, CLASSES), dim=1)),
        vectors(4),
        chain=False,
    ),
    Architecture(
        "orthogonal", lambda: chain(orthogonal(nn.Linear(4, 4)), nn.Tanh(), *head(4)), vectors(4), chain=False
    ),
    Architecture(
        "spectral-norm",
        lambda: chain(spectral_norm(nn.Conv1d(2, 3, 2)), nn.Tanh(), *head(9)),
        vectors(2, 4),
        chain=False,
    ),
]
"""Further layers, and models that are called with keywords."""


def layer_case(name: str) -> Architecture:
    """Return a network by name."""
    return next(a for a in LAYERS if a.name == name)
