"""How many multiply-adds the factored form needs, and the matrix products that they consist of.

For a layer l with I inputs (the bias' one included), O outputs, T positions that share its weights, and `R = V·N` rows
of N samples with V outputs, the rows being `Σ_t g[v,n,t,:] ⊗ a[n,t,:]`:

    forward     N·T·I·O
    backward    R·T·I·O, to the inputs of every layer but the first
    product     T = 1: `(g gᵀ) ∘ (a aᵀ)`, added up:          R²/2·O + N²/2·I + R²/2
                T > 1, the cheaper of forming the rows:      R·T·I·O + R²/2·I·O
                and of visiting the pairs of positions:      N²/2·(T²·I + T²·V·O + T·V²·O)

A symmetric matrix counts once, its diagonal included: above, `R²/2` stands for `R·(R+1)/2`, `N²/2` for `N·(N+1)/2`. In
full it counts as the matrix product that it is, `R²` and `N²`. Activations, pooling and copies count nothing. So the first
count is what no implementation of the form can do without, and the second what one does by matrix products as they are
written; a rate in operations a second counts two for a multiply-add.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn


@dataclass(frozen=True)
class Operations:
    """Multiply-adds of the forward and backward sweep, and of the products of all layers."""

    sweep: int
    product: int


@dataclass(frozen=True)
class Layer:
    """A dense layer or convolution: positions that share its weights, inputs with the bias' one, outputs."""

    positions: int
    inputs: int
    outputs: int


def operations(network: nn.Sequential, inputs: Float[Tensor, "N ..."], *, once: bool = True) -> Operations:
    """Count the multiply-adds of the Gram matrix of a chain of dense layers and convolutions.

    Args:
        network: the chain.
        inputs: its inputs.
        once: whether a symmetric matrix counts once, or in full.
    """
    layers, V = layers_of(network, inputs)
    N = len(inputs)
    R = V * N
    forward = sum(N * layer.positions * layer.inputs * layer.outputs for layer in layers)
    backward = sum(R * layer.positions * layer.inputs * layer.outputs for layer in layers[1:])
    return Operations(forward + backward, sum(gram_product(layer, V, N, once=once) for layer in layers))


def gram_product(layer: Layer, V: int, N: int, *, once: bool = True) -> int:
    """Count the multiply-adds of a layer's share of the Gram matrix of `V·N` rows, a symmetric one once or in full."""
    T, I, O = layer.positions, layer.inputs, layer.outputs  # noqa: E741
    R = V * N
    of_rows, of_samples = (size * (size + 1) // 2 if once else size**2 for size in (R, N))
    if T == 1:
        return of_rows * (O + 1) + of_samples * I
    return min(R * T * I * O + of_rows * I * O, of_samples * T * (T * I + T * V * O + V * V * O))


def matrix_products(network: nn.Sequential, inputs: Float[Tensor, "N ..."]) -> list[tuple[int, int, int]]:
    """List the sizes `(m, k, n)` of the sweep's backward products and of the products of dense layers' rows."""
    layers, V = layers_of(network, inputs)
    R = V * len(inputs)
    backward = [(R * layer.positions, layer.outputs, layer.inputs - 1) for layer in layers[1:]]
    return backward + [(R, layer.outputs, R) for layer in layers if layer.positions == 1]


@torch.no_grad()
def layers_of(network: nn.Sequential, inputs: Float[Tensor, "N ..."]) -> tuple[list[Layer], int]:
    """Return the dense layers and convolutions of a chain, and the number of its outputs."""
    layers, x = [], inputs
    for module in network:
        x = module(x)
        if isinstance(module, nn.Linear | nn.Conv2d):
            weight = module.weight
            layers.append(Layer(x[0, 0].numel(), weight[0].numel() + 1, weight.shape[0]))
    return layers, x.shape[1]
