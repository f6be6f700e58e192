"""Block-diagonal quadratics ½xᵀHx with rotated blocks, and how many steps methods take on them.

Blocks have the spectra {1, 2, 3}, {99, 100, 101}, {4998, 4999, 5000} (*unlike*) or {1, 99, 4998}, {2, 100, 4999}, {3, 101, 5000}
(*alike*): the same nine eigenvalues. Every method is tuned over its rates; a method whose matrix stays has the best one.
"""

from collections.abc import Callable, Mapping

import numpy as np
import scipy.linalg
from jaxtyping import Float
from scipy.stats import ortho_group

UNLIKE, ALIKE, MIXED = "unlike", "alike", "mixed"
SPECTRA: Mapping[str, tuple[tuple[float, ...], ...]] = {
    UNLIKE: ((1, 2, 3), (99, 100, 101), (4998, 4999, 5000)),
    ALIKE: ((1, 99, 4998), (2, 100, 4999), (3, 101, 5000)),
}
"""Of the blocks."""
REDUCTION = 1e-6
"""Part of the loss at the start that is to be reached."""
MOST = 200_000
"""Steps after which nobody is waited for."""
RATES = 24
"""Rates of a method whose matrix changes, two a decade below twice the largest coordinate."""
MOVING = 20_000
"""Steps of such a method, at most."""
SECOND = 0.999
"""β₂ of a moving second moment."""
SIZE = 3
"""Parameters of a block."""

Matrix = Float[np.ndarray, "n n"]
Vector = Float[np.ndarray, " n"]


def quadratic(spectra: str, rng: np.random.Generator) -> tuple[Matrix, Vector]:
    """Return H and the start: blocks rotated at random, and for `mixed` the unlike ones rotated as a whole besides.

    Along the eigenvector of each eigenvalue the start is the same for all spectra, and so is the loss there.
    """
    values = np.array(SPECTRA[UNLIKE if spectra == MIXED else spectra]).ravel()
    along = rng.standard_normal(len(values))[np.argsort(np.argsort(values))]
    turn = scipy.linalg.block_diag(*(ortho_group.rvs(SIZE, random_state=rng) for _ in SPECTRA[UNLIKE]))
    if spectra == MIXED:
        turn = ortho_group.rvs(len(turn), random_state=rng) @ turn
    H = turn * values @ turn.T
    return (H + H.T) / 2, turn @ along


def _of_blocks(values: Float[np.ndarray, "*K n"]) -> Float[np.ndarray, "*K n"]:
    """The mean over each block, at all its entries."""
    return np.repeat(values.reshape(*values.shape[:-1], -1, SIZE).mean(-1), SIZE, axis=-1)


def _best_rates(H: Matrix) -> Vector:
    """2/(λ_max + λ_min) of every diagonal block, at its entries."""
    ends = [np.linalg.eigvalsh(H[i : i + SIZE, i : i + SIZE])[[0, -1]].sum() for i in range(0, len(H), SIZE)]
    return np.repeat(2 / np.array(ends), SIZE)


FIXED: Mapping[str, Callable[[Matrix, Vector], Vector]] = {
    "gd": lambda H, _: np.ones(len(H)),
    "block-gd": lambda H, _: _best_rates(H),
    "adam-fixed": lambda H, x: 1 / np.abs(H @ x),
    "adam-mini-fixed": lambda H, x: 1 / np.sqrt(_of_blocks(np.square(H @ x))),
}
"""Rates of every coordinate, up to one factor, that stay from the start x on."""
MOVING_METHODS = {"adam": lambda square: square, "adam-mini": _of_blocks}
"""What the second moment is the running mean of, from the squared gradient; β₁ = 0."""
METHODS = (*FIXED, *MOVING_METHODS, "block-newton")


def steps(method: str, H: Matrix, x: Vector) -> int:
    """Steps until the loss is `REDUCTION` of that at the start, at the best rate; `MOST` if it takes longer."""
    if method in FIXED:
        return _steps_by(np.diag(FIXED[method](H, x)), H, x)
    if method == "block-newton":
        inverse = scipy.linalg.block_diag(
            *(np.linalg.inv(H[i : i + SIZE, i : i + SIZE]) for i in range(0, len(H), SIZE))
        )
        return _steps_by(inverse, H, x)
    return _moving_steps(MOVING_METHODS[method], H, x)


def _steps_by(preconditioner: Matrix, H: Matrix, x: Vector) -> int:
    """Steps of x ← x − ηPHx at η = 2/(λ_max + λ_min) of P^½HP^½, from its modes."""
    root = scipy.linalg.sqrtm(preconditioner).real
    values, vectors = np.linalg.eigh(root @ H @ root)
    modes = vectors.T @ np.linalg.solve(root, x)
    factors = 1 - 2 * values / (values[0] + values[-1])
    weights = values * np.square(modes)

    def reached(count: int) -> bool:
        return bool((weights * np.abs(factors) ** (2 * count)).sum() <= REDUCTION * weights.sum())

    low, high = 0, 1
    while not reached(high):
        if high >= MOST:
            return MOST
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if reached(middle) else (middle, high)
    return high


def _moving_steps(mean: Callable[[Vector], Vector], H: Matrix, x: Vector) -> int:
    """Steps of Adam with β₁ = 0, of the first of all rates that gets there, all at once."""
    rates = 2 * np.abs(x).max() / np.sqrt(10.0) ** np.arange(RATES)
    at = np.tile(x, (RATES, 1))
    second = np.zeros_like(at)
    aim = REDUCTION * float(x @ H @ x)
    for count in range(1, MOVING + 1):
        gradient = at @ H
        square = np.square(gradient)
        second = SECOND * second + (1 - SECOND) * mean(square)
        at -= rates[:, None] * gradient / (np.sqrt(second / (1 - SECOND**count)) + 1e-12)
        if ((at @ H) * at).sum(1).min() <= aim:
            return count
    return MOVING
