"""How many multiply-adds a training step needs.

For a layer with I inputs (the bias' one included), O outputs and T positions that share its weights, N samples and V
rows a sample in the curvature (mc 1 a draw, exact one an output):

    gradient descent   N·T·I·O forward, as many backward to the weights and, but in the first layer, to the inputs
    sweep              V·N·T·I·O backward to the inputs of every layer but the first; none for empirical rows

K-FAC adds to a step with its sweep

    factors            N·T·I²/2 + V·N·T·O²/2, half a product each
    preconditioning    the cheaper of the gradient's two sides    I·O·(I + O)
                       and of its factors, multiplied once after  N·T·(I² + O² + I·O)
    factorisations     I³/6 + O³/6 for Cholesky, which multiplies with the inverse as the inverse does, d² a vector;
                       divided by the interval from one inversion to the next

and the natural gradient in dual form, with `R = V·N` rows in all,

    Gram matrix        as in `benchmarks.operations`
    factorisation      R³/6 for Cholesky, R² for the two triangular solves
    combination        N·T·I·O + R·T·O for `Sᵀc`
    projection         for mc rows, of whom the gradient is no combination, S∇L: as much again, or by
                       the gradient's own factors, whose inputs' products the Gram matrix has, N²·T²·O

A symmetric matrix counts once, its diagonal included: `I²/2` stands for `I·(I+1)/2`. Momentum, activations, pooling and
copies count nothing. So this is what no implementation can do without, rather than what one of them does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.operations import Layer, gram_product


@dataclass(frozen=True)
class StepOperations:
    """Multiply-adds of what every step does, and of factorising each layer's factors."""

    every: int
    factorisations: tuple[int, ...] = ()

    def mean(self, interval: int) -> float:
        """Return the mean of a step when inverses are made anew once in so many."""
        return self.every + sum(self.factorisations) / interval


def gradient_descent(layers: Sequence[Layer], N: int) -> StepOperations:
    """Count a step of gradient descent."""
    return StepOperations(2 * _products(layers, N) + _products(layers[1:], N))


def kfac(layers: Sequence[Layer], N: int, V: int) -> StepOperations:
    """Count a step with K-FAC, whose rows take a sweep."""
    work = gradient_descent(layers, N).every + V * _products(layers[1:], N)
    for layer in layers:
        T, I, O = layer.positions, layer.inputs, layer.outputs  # noqa: E741
        work += N * T * (_half(I) + V * _half(O))
        work += min(I * O * (I + O), N * T * (I**2 + O**2 + I * O))
    return StepOperations(work, tuple((layer.inputs**3 + layer.outputs**3) // 6 for layer in layers))


def dual(layers: Sequence[Layer], N: int, V: int, *, sweeps: int, projects: bool) -> StepOperations:
    """Count a step of natural gradient in dual form.

    Args:
        layers: the network's.
        N: number of samples.
        V: rows a sample.
        sweeps: backward passes to the layers' outputs beyond that of the gradient.
        projects: whether the step needs `S∇L`.
    """
    R = V * N
    work = gradient_descent(layers, N).every + sweeps * _products(layers[1:], N) + R**3 // 6 + R**2
    for layer in layers:
        T, I, O = layer.positions, layer.inputs, layer.outputs  # noqa: E741
        combination = N * T * I * O + R * T * O
        work += gram_product(layer, V, N) + combination
        work += min(combination, N**2 * T**2 * V * O) if projects else 0
    return StepOperations(work)


def _products(layers: Sequence[Layer], N: int) -> int:
    return sum(N * layer.positions * layer.inputs * layer.outputs for layer in layers)


def _half(size: int) -> int:
    return size * (size + 1) // 2
