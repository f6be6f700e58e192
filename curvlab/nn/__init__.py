"""Modules that the theory is written for: NTK, two-layer and graph networks, losses, linearisation."""

from curvlab.nn.linearize import Linearized, linearize
from curvlab.nn.losses import GaussianNLL, HalfSquaredError, PerSample, Scaled, WeightedCrossEntropy
from curvlab.nn.ntk import ACTIVATIONS, Erf, NTKLinear, ntk_mlp
from curvlab.nn.propagation import GraphNetwork, NodesLast, Propagation, gcn
from curvlab.nn.tasks import MultiTask, Task
from curvlab.nn.two_layer import TwoLayer

__all__ = [
    "ACTIVATIONS",
    "Erf",
    "GaussianNLL",
    "GraphNetwork",
    "HalfSquaredError",
    "Linearized",
    "MultiTask",
    "NTKLinear",
    "NodesLast",
    "PerSample",
    "Propagation",
    "Scaled",
    "Task",
    "TwoLayer",
    "WeightedCrossEntropy",
    "gcn",
    "linearize",
    "ntk_mlp",
]
