"""A ResNet-18 for small images, and a transformer in two forms."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

FEATURES, LENGTH, WIDTH, HEADS, DEPTH = 64, 32, 128, 4, 4
"""The transformer: features of an input, positions, width, attention heads, layers."""


class _Residual(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.main = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU(),
            nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False), nn.BatchNorm2d(outputs),
        )  # fmt: skip
        self.shortcut = nn.Sequential()
        if stride > 1:
            self.shortcut.extend([nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)])

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.main(x) + self.shortcut(x))


def resnet18() -> nn.Module:
    """Return a ResNet-18 with a 3×3 stem for images of 32×32 and a quarter of the channels, in evaluation mode."""
    stem = [nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU()]
    channels = [(16, 16, 1), (16, 32, 2), (32, 64, 2), (64, 128, 2)]
    stages = [block for i, o, s in channels for block in (_Residual(i, o, s), _Residual(o, o, 1))]
    return nn.Sequential(*stem, *stages, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, 10)).eval()


Make = Callable[..., nn.Module]


class _Attention(nn.Module):
    def __init__(self, dense: Make) -> None:
        super().__init__()
        self.queries_keys_values, self.out = dense(WIDTH, 3 * WIDTH), dense(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        mapped = self.queries_keys_values(x)
        channels_first = mapped.ndim == 4
        sequence = mapped[..., 0].mT if channels_first else mapped
        q, k, v = (part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in sequence.chunk(3, dim=-1))
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        found: Tensor = self.out(mixed.mT[..., None] if channels_first else mixed)
        return found


class _Layer(nn.Module):
    def __init__(self, dense: Make, norm: Make) -> None:
        super().__init__()
        self.attention = nn.Sequential(norm(), _Attention(dense))
        self.feed_forward = nn.Sequential(norm(), dense(WIDTH, 4 * WIDTH), nn.ReLU(), dense(4 * WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(x)
        found: Tensor = x + self.feed_forward(x)
        return found


class _Pool(nn.Module):
    """Average over the positions, the axis 1 of sequences and 2 of feature maps."""

    def forward(self, x: Tensor) -> Float[Tensor, "N C"]:
        return x.mean(1) if x.ndim == 3 else x.mean((2, 3))


def _transformer(dense: Make, norm: Make) -> nn.Module:
    layers = [_Layer(dense, norm) for _ in range(DEPTH)]
    return nn.Sequential(dense(FEATURES, WIDTH), *layers, norm(), _Pool(), nn.Linear(WIDTH, 10))


def transformer() -> nn.Module:
    """Return an encoder of `Linear` layers on sequences `[N, T, FEATURES]`, normalised before every block."""
    return _transformer(nn.Linear, lambda: nn.LayerNorm(WIDTH))


def pointwise_transformer() -> nn.Module:
    """Return the same encoder of 1×1 convolutions on `[N, FEATURES, T, 1]`, with group normalisation.

    nngeometry has no rule for a `Linear` or a `LayerNorm` on sequences, but has for these.
    """
    return _transformer(lambda i, o: nn.Conv2d(i, o, 1), lambda: nn.GroupNorm(1, WIDTH))


def freeze_normalisations(network: nn.Module) -> None:
    """Leave trainable the parameters of layers that have Kronecker factors in every library: Linear and Conv2d."""
    for module in network.modules():
        if not isinstance(module, nn.Linear | nn.Conv2d):
            for parameter in module.parameters(recurse=False):
                parameter.requires_grad_(False)


def trained(network: nn.Module) -> dict[str, Tensor]:
    """Return the trainable parameters by name."""
    return {name: p for name, p in network.named_parameters() if p.requires_grad}


def flattened(named: dict[str, Tensor], network: nn.Module) -> Float[Tensor, " P"]:
    """Join tensors by name in the order of the trainable parameters."""
    return torch.cat([named[name].detach().flatten() for name in trained(network)])
