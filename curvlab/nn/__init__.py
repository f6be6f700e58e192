"""Modules that the theory is written for: NTK and two-layer networks, the half squared error, linearisation."""

from curvlab.nn.linearize import Linearized, linearize
from curvlab.nn.losses import HalfSquaredError
from curvlab.nn.ntk import ACTIVATIONS, Erf, NTKLinear, ntk_mlp
from curvlab.nn.two_layer import TwoLayer

__all__ = [
    "ACTIVATIONS",
    "Erf",
    "HalfSquaredError",
    "Linearized",
    "NTKLinear",
    "TwoLayer",
    "linearize",
    "ntk_mlp",
]
