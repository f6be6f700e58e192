"""Decoders of the shape of GPT-2, and batches of tokens drawn at random."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

ModelName = Literal["tiny", "gpt", "vocabulary", "gpt2-small", "gpt2-medium"]

HEAD = 64
"""Width of an attention head."""

SCALE = 0.02
"""Standard deviation of tables, as GPT-2 has it: with torch's, of 1, outputs of a tied one are so large that a draw is no draw."""


@dataclass(frozen=True)
class Shape:
    """A decoder and a batch.

    Attributes:
        blocks: how many.
        width: of the residual stream.
        vocabulary: number of tokens.
        sequences: N.
        length: T, tokens of a sequence.
        tied: whether the table of tokens is the weight of the output layer, too.
    """

    blocks: int
    width: int
    vocabulary: int
    sequences: int
    length: int
    tied: bool = False

    def __str__(self) -> str:
        tied = ", tied" if self.tied else ""
        return (
            f"{self.blocks} blocks of width {self.width}, vocabulary {self.vocabulary}{tied}, "
            f"{self.sequences} × {self.length} tokens"
        )

    def build(self, device: str) -> tuple[Decoder, Int[Tensor, "N T"], Int[Tensor, "N T"]]:
        """Return decoder, tokens and targets, the same numbers in every process and on every device."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            decoder = Decoder(self).to(device)
            tokens = torch.randint(self.vocabulary, (self.sequences, self.length + 1)).to(device)
        return decoder, tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


SHAPES: Mapping[ModelName, Shape] = {
    "tiny": Shape(1, 64, 50, 2, 8),
    "gpt": Shape(4, 512, 1000, 8, 128),
    "vocabulary": Shape(4, 256, 50_000, 2, 128),
    "gpt2-small": Shape(12, 768, 50257, 2, 256, tied=True),
    "gpt2-medium": Shape(24, 1024, 50257, 2, 256, tied=True),
}


class Block(nn.Module):
    """Attention to the tokens so far, and two dense layers, each added to the residual stream."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.attention_norm, self.dense_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.mix = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.wide, self.narrow = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Float[Tensor, "N T d"]) -> Float[Tensor, "N T d"]:
        """Return the residual stream behind the block."""
        N, T, d = x.shape
        q, k, v = self.qkv(self.attention_norm(x)).view(N, T, 3, d // HEAD, HEAD).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.mix(attended.transpose(1, 2).reshape(N, T, d))
        stream: Tensor = x + self.narrow(F.gelu(self.wide(self.dense_norm(x))))
        return stream


class Decoder(nn.Module):
    """Logits of the next token, one a row: `[N·T, vocabulary]`, as losses and other libraries take them."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.tokens, self.positions = (
            nn.Embedding(shape.vocabulary, shape.width),
            nn.Embedding(shape.length, shape.width),
        )
        self.blocks = nn.Sequential(*(Block(shape.width) for _ in range(shape.blocks)))
        self.norm, self.head = nn.LayerNorm(shape.width), nn.Linear(shape.width, shape.vocabulary, bias=False)
        if shape.tied:
            self.head.weight = self.tokens.weight
        for table in (self.tokens, self.positions):
            nn.init.normal_(table.weight, std=SCALE)

    def forward(self, x: Int[Tensor, "N T"]) -> Float[Tensor, "NT vocabulary"]:
        """Return the logits, one sequence after the other."""
        h = self.tokens(x) + self.positions(torch.arange(x.shape[1], device=x.device))
        logits: Tensor = self.head(self.norm(self.blocks(h)))
        return logits.flatten(0, 1)
