"""How unlike spectra are: densities of eigenvalues, and the Jensen–Shannon distance between them.

The distance is √JSD with logarithms to the base 2, from 0 to 1. *Linear* densities are those of Zhang, Chen, Ding et al.: Gaussians
of standard deviation √1e-5 on an even grid of λ from one below the least eigenvalue to one above the largest. *Logarithmic* ones
are of log₁₀|λ|, so that a factor by which a block is scaled is a shift.
"""

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from curvlab.spectrum import Partition

LINEAR = 1e-5**0.5
"""Standard deviation of the published smoothing."""
POINTS = 50_000
"""Points of the published grid, at most."""
WIDTHS = (0.1, 0.3, 1.0)
"""Standard deviations of the smoothing of log₁₀|λ|, in decades."""
WIDTH = 0.3
"""The one in the middle, at which scale and shape are told apart."""
FLOOR = 1e-8
"""Part of a block's largest modulus as which smaller eigenvalues count."""
STEP = 0.05
"""Grid of log₁₀|λ|, in decades."""
NOTHING = 1e-12
"""Part of the largest norm up to which a block counts as zero, such as that of biases of keys, and has no logarithmic density."""
TENTH = 10
NORMALISATIONS = ("raw", "trace", "top", "tenth")
"""What logarithmic spectra are divided by: nothing, the sum of moduli, the largest, or the tenth largest (or last) modulus."""

Spectra = Sequence[Float[np.ndarray, " n"]]


def spectra_of(matrix: Float[Tensor, "P P"], partition: Partition) -> list[Float[np.ndarray, " n"]]:
    """Eigenvalues of every diagonal block of a symmetric matrix, ascending."""
    at = [partition.indices(block) for block in range(len(partition))]
    return [torch.linalg.eigvalsh(matrix[i[:, None], i]).double().numpy(force=True) for i in at]


def linear_distance(spectra: Spectra) -> float:
    """Mean distance of pairs, of linear densities as published."""
    low, high = min(s.min() for s in spectra) - 1, max(s.max() for s in spectra) + 1
    grid = np.linspace(low, high, min(POINTS, int(2 * (high - low) / LINEAR) + 2))
    return _distance([_smoothed(s, grid, LINEAR) for s in spectra])


def logarithmic_distance(spectra: Spectra, normalised: str, width: float) -> float:
    """Mean distance of pairs, of logarithmic densities after a normalisation; blocks that are zero are left out."""
    places = list(log_places(spectra, normalised).values())
    grid = _grid(places, width)
    return _distance([_smoothed(one, grid, width) for one in places])


def log_places(spectra: Spectra, normalised: str) -> dict[int, Float[np.ndarray, " n"]]:
    """log₁₀ of the moduli after a normalisation, by block, of blocks that are not zero."""
    norms = [float(np.linalg.norm(s)) for s in spectra]
    found = {}
    for block, (spectrum, norm) in enumerate(zip(spectra, norms, strict=True)):
        if norm <= NOTHING * max(norms):
            continue
        sizes = np.sort(np.abs(spectrum))[::-1]
        sizes = sizes.clip(min=FLOOR * sizes[0])
        by = {"raw": 1.0, "trace": sizes.sum(), "top": sizes[0], "tenth": sizes[:TENTH][-1]}[normalised]
        found[block] = np.log10(sizes / by)
    return found


def log_densities(spectra: Spectra) -> tuple[Float[np.ndarray, " G"], dict[int, Float[np.ndarray, " G"]]]:
    """A grid of log₁₀|λ| and the density a decade of every block that is not zero, not normalised."""
    places = log_places(spectra, "raw")
    grid = _grid(list(places.values()), WIDTH)[:: round(WIDTH / STEP / 2)]
    return grid, {block: _smoothed(one, grid, WIDTH) for block, one in places.items()}


def _grid(places: Spectra, width: float) -> Float[np.ndarray, " G"]:
    low, high = min(p.min() for p in places) - 4 * width, max(p.max() for p in places) + 4 * width
    return np.arange(low, high + STEP, STEP)


def _smoothed(values: Float[np.ndarray, " n"], grid: Float[np.ndarray, " G"], width: float) -> Float[np.ndarray, " G"]:
    """The density of values with Gaussians about them, on a grid, to whose points each value is shared out first."""
    step = grid[1] - grid[0]
    places = (values - grid[0]) / step
    below = np.floor(places).astype(int)
    counts = np.bincount(below, 1 - (places - below), len(grid) + 1) + np.bincount(
        below + 1, places - below, len(grid) + 1
    )
    reach = int(np.ceil(6 * width / step))
    kernel = np.exp(-0.5 * (np.arange(-reach, reach + 1) * step / width) ** 2)
    found = np.convolve(counts[: len(grid)], kernel)[reach : reach + len(grid)]
    return np.asarray(found / (found.sum() * step))


def _distance(densities: Sequence[Float[np.ndarray, " G"]]) -> float:
    """Mean Jensen–Shannon distance of all pairs of densities on one grid."""
    shares = [density / density.sum() for density in densities]
    entropies = [_entropy(share) for share in shares]
    found = [
        max(0.0, _entropy((shares[b] + shares[c]) / 2) - (entropies[b] + entropies[c]) / 2) ** 0.5
        for b in range(len(shares))
        for c in range(b)
    ]
    return float(np.mean(found)) if found else 0.0


def _entropy(share: Float[np.ndarray, " G"]) -> float:
    """Entropy in bits."""
    kept = share[share > 0]
    return float(-(kept * np.log2(kept)).sum())
