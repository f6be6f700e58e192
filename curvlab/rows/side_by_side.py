"""Rows of several layers side by side, as those of a block that covers them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from curvlab.rows.layer import LayerRows
from curvlab.rows.products import chunks
from curvlab.rows.rows import gram


def times(layers: Sequence[LayerRows], x: Float[Tensor, "K P_b"]) -> Float[Tensor, "K R"]:
    """Multiply rows with a block's vectors."""
    pieces = x.split([layer.size for layer in layers], dim=-1)
    products = [layer.matvec(piece) for layer, piece in zip(layers, pieces, strict=True)]
    return torch.stack(products).sum(0)


def combine(layers: Sequence[LayerRows], c: Float[Tensor, "K R"]) -> Float[Tensor, "K P_b"]:
    """Combine rows with coefficients."""
    return torch.cat([layer.rmatvec(c) for layer in layers], dim=-1)


def dense(layers: Sequence[LayerRows]) -> Float[Tensor, "R P_b"]:
    """Form the rows. Memory `R·P_b`."""
    return torch.cat([layer.dense() for layer in layers], dim=-1)


def moment(layers: Sequence[LayerRows]) -> Float[Tensor, "P_b P_b"]:
    """Form `SᵀS`, in chunks of samples. Cost `R·P_b²`."""
    size = sum(layer.size for layer in layers)
    V, N = layers[0].shape
    total = layers[0].row_factors[-1].new_zeros(size, size)
    for part in chunks(N, V * size):
        rows = dense([layer.select(part) for layer in layers])
        total.addmm_(rows.T, rows)
    return total


def gram64(layers: Sequence[LayerRows]) -> Float[Tensor, "R R"]:
    """Return `SSᵀ` in float64."""
    precise = [layer.to(torch.float64) for layer in layers]
    return gram(precise, precise)
