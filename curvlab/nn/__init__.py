"""Modules that the theory is written for: NTK-parameterised layers, the half squared error, linearisation."""

from curvlab.nn.linearize import Linearized, linearize
from curvlab.nn.losses import HalfSquaredError
from curvlab.nn.ntk import ACTIVATIONS, Erf, NTKLinear, ntk_mlp

__all__ = [
    "ACTIVATIONS",
    "Erf",
    "HalfSquaredError",
    "Linearized",
    "NTKLinear",
    "linearize",
    "ntk_mlp",
]
