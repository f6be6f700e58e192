"""Layers on vectors: linear maps, and bilinear ones, which are linear in the products of their inputs."""

from __future__ import annotations

import torch
from torch import Tensor

from curvlab.nn import NTKLinear
from curvlab.rows.factored import KroneckerRows
from curvlab.rows.layer import LayerRows
from curvlab.rows.modules.rule import Inputs, LayerUse, Rule, augmented


def _linear(use: LayerUse, inputs: Inputs, g: Tensor) -> LayerRows:
    module, x = use.module, inputs[0]
    if isinstance(module, NTKLinear):
        return _on_vectors(use, x * module.weight_scale, g, module.bias_scale)
    return _on_vectors(use, x, g)


def _bilinear(use: LayerUse, inputs: Inputs, g: Tensor) -> LayerRows:
    left, right = inputs
    return _on_vectors(use, torch.einsum("...i,...j->...ij", left, right).flatten(-2), g)


def _on_vectors(use: LayerUse, x: Tensor, g: Tensor, bias_scale: float = 1.0) -> LayerRows:
    """Return the rows of a layer on the last axis; axes between the first and the last are positions."""
    V, N = g.shape[:2]
    T = x.shape[1:-1].numel()
    rows = g.reshape(V, N, T, 1, g.shape[-1])
    return KroneckerRows.deferred(
        use.name, use.layout, lambda n: augmented(x[n].reshape(-1, T, 1, x.shape[-1]), use.names, bias_scale), rows
    )


LINEAR = Rule(lambda m: m.weight.shape[0], _linear)
INPUT_FIRST_LINEAR = Rule(lambda m: m.weight.shape[1], _linear, input_first=lambda _: 1)
"""For a weight `[in, out]`, as in GPT-2."""
BILINEAR = Rule(lambda m: m.out_features, _bilinear)
