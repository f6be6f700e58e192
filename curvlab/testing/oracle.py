"""Dense float64 references, written from definitions by `torch.func` on the user's own model and loss.

They know nothing of rows, factors or engines. Rows are ordered `(v, n)`, v = (c, x) outermost, columns follow
`named_parameters()`: inputs of N samples, outputs `[N, C, *]` with V = C·X entries a sample, and R = V·N rows.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, hessian, jacrev
from torch.nn import functional as F

from curvlab.nn import GaussianNLL, HalfSquaredError
from curvlab.nn.functional import attributes_kept


def outputs(model: nn.Module, inputs: Any, pick: Callable[[Any], Tensor] = lambda z: z) -> Tensor:
    """Return the picked output `[N, C, *]`."""
    args, kwargs = unpack(inputs)
    with torch.no_grad(), attributes_kept(model), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The PyTorch API of nested tensors")
        return pick(model(*args, **kwargs))


def unpack(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return positional and keyword arguments of a model."""
    if isinstance(inputs, dict):
        return (), inputs
    return (inputs if isinstance(inputs, tuple) else (inputs,)), {}


def trainable(model: nn.Module) -> dict[str, Tensor]:
    """Return copies of the trainable parameters, by name."""
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def dense_jacobian(model: nn.Module, inputs: Any, pick: Callable[[Any], Tensor] = lambda z: z) -> Tensor:
    """Return J `[R, P]` with rows `(c, x, n)`."""
    args, kwargs = unpack(inputs)
    z = outputs(model, inputs, pick)
    N, V = z.shape[0], z[0].numel()
    with attributes_kept(model), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "There is a performance drop")
        by_name = jacrev(lambda parameters: pick(functional_call(model, parameters, args, kwargs)))(trainable(model))
    columns = [by_name[name].reshape(N, V, -1) for name in trainable(model)]
    return torch.cat(columns, dim=-1).transpose(0, 1).reshape(V * N, -1)


def output_major(matrix: Tensor, N: int) -> Tensor:
    """Reorder rows from `(v, n)` to `(n, v)`, the order of `z.flatten()`."""
    V = matrix.shape[0] // N
    return matrix.view(V, N, -1).transpose(0, 1).reshape(V * N, -1)


def dense_ggn(J: Tensor, loss: nn.Module, z: Tensor, targets: Any) -> Tensor:
    """Return `Jᵀ (∂²loss/∂z²) J`, the Hessian of the loss after linearising the model."""
    H = hessian(lambda flat: loss(flat.view_as(z), targets))(z.flatten())
    rows = output_major(J, z.shape[0])
    ggn: Tensor = rows.T @ H @ rows
    return ggn


def unreduced(loss: nn.Module) -> Callable[[Tensor, Tensor], Tensor]:
    """Return the loss with one value a term."""
    if isinstance(loss, HalfSquaredError):
        return nn.MSELoss(reduction="none")
    if isinstance(loss, GaussianNLL):
        return lambda z, y: F.gaussian_nll_loss(z, y, loss.variance.expand_as(z), reduction="none")
    single = copy.copy(loss)
    vars(single)["reduction"] = "none"
    return single


def term_weights(loss: nn.Module, z: Tensor, targets: Tensor) -> Tensor:
    """Return the weight of every loss term: `[N, 1, *]` for a softmax, `[N, C, *]` for element-wise losses."""
    if isinstance(loss, nn.CrossEntropyLoss):
        classes = z.shape[1]
        weight = torch.ones(classes, dtype=z.dtype) if loss.weight is None else loss.weight
        if targets.is_floating_point():
            smoothed = (1 - loss.label_smoothing) * targets + loss.label_smoothing / classes
            return torch.einsum("c,nc...->n...", weight, smoothed).unsqueeze(1)
        counted = targets != loss.ignore_index
        own = weight[torch.where(counted, targets, 0)]
        smooth = loss.label_smoothing
        return (((1 - smooth) * own + smooth * weight.mean()) * counted).unsqueeze(1)
    if isinstance(loss, nn.BCEWithLogitsLoss):
        positive = 1.0 if loss.pos_weight is None else loss.pos_weight
        each = 1.0 if loss.weight is None else loss.weight
        return (each * (positive * targets + 1 - targets)).expand_as(z)
    return torch.ones_like(z)


def count_of(loss: nn.Module, z: Tensor, targets: Tensor) -> float:
    """Return the divisor of the loss' mean, from the ratio of its sum to its mean."""
    if loss.reduction == "sum":
        return 1.0
    summed = copy.copy(loss)
    vars(summed)["reduction"] = "sum"
    other = z + torch.linspace(0.1, 0.7, z.numel(), dtype=z.dtype).view_as(z)
    return float(summed(other, targets) / loss(other, targets))


def dense_empirical(J: Tensor, loss: nn.Module, z: Tensor, targets: Tensor) -> Tensor:
    """Return Σ ggᵀ over positions, with g the sum of `∇ℓ_i/√(w_i·count)` over the terms of a position."""
    N, C = z.shape[:2]
    factor = 0.5 if isinstance(loss, HalfSquaredError) else 1.0
    terms = unreduced(loss)

    def values(flat: Tensor) -> Tensor:
        return factor * terms(flat.view_as(z), targets).reshape(N, -1, z[0, 0].numel())

    gradients = jacrev(values)(z.flatten())
    weights = term_weights(loss, z, targets).reshape(N, -1, z[0, 0].numel())
    scale = torch.where(weights > 0, weights, 1).rsqrt() * (weights > 0) / count_of(loss, z, targets) ** 0.5
    cotangents = (gradients * scale[..., None]).sum(1).flatten(0, 1)
    rows = cotangents @ output_major(J, N)
    assert cotangents.shape[1] == N * C * z[0, 0].numel()
    product: Tensor = rows.T @ rows
    return product


def assert_close(got: Tensor, expected: Tensor, tolerance: float | int = 1e-10) -> None:
    """Assert that two tensors of one shape agree relative to the reference's largest entry."""
    assert got.shape == expected.shape, f"{tuple(got.shape)} is not {tuple(expected.shape)}"
    scale = float(expected.abs().max())
    error = float((got - expected).abs().max())
    assert error <= tolerance * max(scale, 1e-300), f"error {error:.2e} at scale {scale:.2e}"
