"""Curvature analysis of neural networks: exact and approximate Fisher matrices, judged in function space."""

from curvlab.compare import compare
from curvlab.nn import linearize
from curvlab.rows import Rows, gram, jacobian, sqrt_fisher

__all__ = ["Rows", "compare", "gram", "jacobian", "linearize", "sqrt_fisher"]
