"""Regression on a Chebyshev polynomial: a task small enough for an exact Hessian at every step."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from curvlab.nn import HalfSquaredError
from curvlab.problems.problem import Problem

GAIN = 1.9
"""Of the first layer's Xavier normal initialisation."""


def chebyshev_problem(
    *, degree: int = 3, width: int = 100, samples: int = 20, seed: int = 0, dtype: torch.dtype = torch.float64
) -> Problem:
    """Return T_k on evenly spaced points of [−1, 1] with a 1-width-1 tanh network, ½ (f − y)² averaged over samples.

    Xavier normal weights, of gain 1.9 in the first layer, which has a bias that starts at 0; no bias in the second. The
    test points are the midpoints of the training points.

    Args:
        degree: k, 3 to 5 in the paper.
        width: hidden units.
        samples: training points, at least 2.
        seed: of the initialisation.
        dtype: of model and data.

    Raises:
        ValueError: an argument is out of its range.

    Source: Cohen et al. 2021, appendix on Chebyshev regression (`chebyshev-k-20` of the published code).
    """
    if degree < 0 or width < 1 or samples < 2:
        raise ValueError(
            f"degree must be at least 0, width at least 1 and samples at least 2; got {degree}, {width}, {samples}."
        )
    x = np.linspace(-1.0, 1.0, samples)

    def values(points: np.ndarray) -> tuple[Tensor, Tensor]:
        targets = np.polynomial.Chebyshev.basis(degree)(points)
        inputs, outputs = (torch.from_numpy(each[:, None]).to(dtype) for each in (points, targets))
        return inputs, outputs

    hidden, last = nn.Linear(1, width, dtype=dtype), nn.Linear(width, 1, bias=False, dtype=dtype)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        nn.init.xavier_normal_(hidden.weight, gain=GAIN, generator=generator)
        nn.init.zeros_(hidden.bias)
        nn.init.xavier_normal_(last.weight, generator=generator)
    model = nn.Sequential(hidden, nn.Tanh(), last)
    return Problem(f"chebyshev-{degree}-{samples}", model, HalfSquaredError(), values(x), values((x[1:] + x[:-1]) / 2))
