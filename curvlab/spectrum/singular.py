"""Singular values of rows in float64, on their smaller side; and what is known about the rows beforehand.

There are two exact routes. The Gram matrix `SSᵀ` (or `SᵀS`, if that is smaller) comes straight from the rows' factors,
but squares the singular values: its eigenvalues carry an error of `R·ε·λ_max`, so that nothing is seen below about 1e-8
of the largest singular value. A QR factorisation of the dense rows keeps all digits, at the cost of forming them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from curvlab.errors import NotPositiveDefinite
from curvlab.rows.layer import LayerRows
from curvlab.rows.loss import OutputRoot
from curvlab.rows.products import CHUNK_ELEMENTS, chunks
from curvlab.rows.side_by_side import combine, dense, gram64, moment, times
from curvlab.spectrum.lanczos import Product

EPS = torch.finfo(torch.float64).eps
COPIES = 3
"""Matrices of the largest size that a decomposition holds at once."""

Layers = Sequence[LayerRows]


def sides(layers: Layers) -> tuple[int, int]:
    """Return `(R, P)`."""
    return layers[0].count, sum(layer.size for layer in layers)


def gram_bytes(layers: Layers) -> int:
    """Return the memory of `gram_eigenvalues`."""
    return 8 * COPIES * min(sides(layers)) ** 2


def singular_bytes(layers: Layers) -> int:
    """Return the memory of `singular_values`."""
    R, P = sides(layers)
    part = R * max(layer.size for layer in layers) if R <= P else max(layers[0].shape[0] * P, CHUNK_ELEMENTS)
    return 8 * COPIES * (min(R, P) ** 2 + part)


def gram_eigenvalues(layers: Layers) -> Float[Tensor, " n"]:
    """Return the `min(R, P)` eigenvalues of `SSᵀ` or `SᵀS`, descending. Cost `n³` beside forming the matrix."""
    R, P = sides(layers)
    matrix = gram64(layers) if R <= P else moment([layer.to(torch.float64) for layer in layers])
    return descending(torch.linalg.eigvalsh(matrix), torch.float64)


def singular_values(layers: Layers) -> Float[Tensor, " n"]:
    """Return the `min(R, P)` singular values of the rows, descending.

    By a QR factorisation that takes in the dense rows part by part (layer by layer for R ≤ P, else by samples), and the
    singular values of its triangular factor. Cost `R·P·min(R, P)`.
    """
    n = min(sides(layers))
    triangle = torch.zeros(0, n, dtype=torch.float64, device=layers[0].row_factors[-1].device)
    for part in _parts([layer.to(torch.float64) for layer in layers]):
        triangle = torch.linalg.qr(torch.cat([triangle, part]), mode="r").R
    values: Tensor = torch.linalg.svdvals(triangle)
    return values.cpu()


def _parts(layers: Layers) -> Iterator[Float[Tensor, "m n"]]:
    R, P = sides(layers)
    if R <= P:
        for layer in layers:
            yield layer.dense().T
    else:
        for samples in chunks(layers[0].shape[1], layers[0].shape[0] * P):
            yield dense([layer.select(samples) for layer in layers])


def checked(gram: Float[Tensor, "R R"]) -> Float[Tensor, "R R"]:
    """Return a Gram matrix in float64, round-off asymmetry averaged away.

    Raises:
        ValueError: if it is empty, not a finite square matrix of floating-point numbers, or not symmetric.
    """
    if gram.ndim != 2 or gram.shape[0] != gram.shape[1] or not gram.is_floating_point():
        raise ValueError(
            f"A Gram matrix is a square matrix of floating-point numbers, got {gram.dtype} of shape "
            f"{tuple(gram.shape)}. For rows that are not square pass S @ S.T, or a curvlab.Rows."
        )
    if not len(gram):
        raise ValueError("The Gram matrix is empty: there are no rows to take a rank of.")
    broken = ~torch.isfinite(gram).all(1)
    if bool(broken.any()):
        raise ValueError(f"The Gram matrix is not finite, first in row {int(broken.nonzero()[0])}.")
    matrix = gram.double()
    asymmetry = float((matrix - matrix.T).abs().max())
    if asymmetry > torch.finfo(gram.dtype).eps ** 0.5 * float(matrix.abs().max()):
        raise ValueError(
            f"The Gram matrix differs from its transpose by {asymmetry:.1e}, more than round-off. If it is meant to be "
            "symmetric, pass (G + G.T) / 2."
        )
    return (matrix + matrix.T) / 2


def descending(eigenvalues: Float[Tensor, " n"], dtype: torch.dtype) -> Float[Tensor, " n"]:
    """Return eigenvalues of a positive semi-definite matrix in float64 and in descending order.

    Args:
        eigenvalues: in any order.
        dtype: what the matrix was computed in, which says how much round-off there may be.

    Raises:
        NotPositiveDefinite: if one is below `-√ε·λ_max`.
    """
    values = eigenvalues.double().cpu().sort(descending=True).values
    if float(values[-1]) < -(torch.finfo(dtype).eps ** 0.5) * float(values.abs().max()):
        raise NotPositiveDefinite(
            f"The eigenvalue {float(values[-1]):.3e} beside the largest, {float(values[0]):.3e}, is more than round-off. "
            "A Gram matrix S @ S.T has none below 0."
        )
    return values


def check_finite(layers: Layers) -> None:
    """Raise a ValueError that names the layer and the row of the first entry that is not finite."""
    for layer in layers:
        V, N = layer.shape
        broken = torch.zeros(V, N, dtype=torch.bool, device=layer.row_factors[-1].device)
        for rows in layer.row_factors:
            broken |= ~torch.isfinite(rows.flatten(2)).all(-1)
        for factor in layer.sample_factors:
            broken |= ~torch.isfinite(factor.flatten(1)).all(-1)
        if bool(broken.any()):
            row = int(broken.flatten().nonzero()[0])
            raise ValueError(
                f"Row {row} (v = {row // N} of {V}, sample {row % N}) of layer {layer.name!r} is not finite; look at the "
                "model's parameters and at that sample."
            )


class Directions:
    """The directions of row space `[V, N]` in which rows are not known to vanish.

    Rows that are exactly zero vanish. So does one combination of the rows of a position under a softmax, `Σ_k √p_k S_k`.

    Args:
        layers: rows, `[V, N]`.
        root: of the loss, if it gave the rows.
    """

    def __init__(self, layers: Layers, root: OutputRoot | None) -> None:
        self.alive = ~zero_rows(layers)
        self._nulls: list[tuple[slice, Float[Tensor, "C X N"]]] = []
        for at, null in () if root is None else root.nulls:
            C, N, X = null.shape
            vectors = null.double().transpose(1, 2) * self.alive[at].view(C, X, N)
            self._nulls.append((at, vectors / vectors.norm(dim=0).clamp_min(torch.finfo(torch.float64).tiny)))

    @property
    def count(self) -> int:
        """How many there are."""
        return int(self.alive.sum()) - sum(int(vectors.any(0).sum()) for _, vectors in self._nulls)

    def project(self, coefficients: Float[Tensor, " R"]) -> Float[Tensor, " R"]:
        """Project on them."""
        kept = coefficients.view(self.alive.shape) * self.alive
        for at, vectors in self._nulls:
            block = kept[at].view(vectors.shape)
            kept[at] = (block - vectors * (vectors * block).sum(0)).flatten(0, 1)
        return kept.flatten()


def zero_rows(layers: Layers) -> Bool[Tensor, "V N"]:
    """Return which rows are exactly zero."""
    zero = torch.ones(layers[0].shape, dtype=torch.bool, device=layers[0].row_factors[-1].device)
    for layer in layers:
        own = torch.ones_like(zero)
        for rows in layer.row_factors:
            own &= ~rows.flatten(2).any(-1)
        for factor in layer.sample_factors if layer.summands == 1 else ():
            if factor.is_floating_point():
                own |= ~factor.flatten(1).any(-1)
        zero &= own
    return zero


def small_operator(layers: Layers) -> tuple[Product, int]:
    """Return `SSᵀ` as an operator on `[R]`, or `SᵀS` on `[P]` if that is smaller, in float64; and its size."""
    precise = [layer.to(torch.float64) for layer in layers]
    R, P = sides(layers)
    if R <= P:
        return lambda c: times(precise, combine(precise, c[None]))[0], R
    return lambda x: combine(precise, times(precise, x[None]))[0], P
