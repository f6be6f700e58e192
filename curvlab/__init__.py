"""Curvature analysis of neural networks: exact and approximate Fisher matrices, judged in function space."""

from curvlab.advice import Advice, advise
from curvlab.compare import Comparison, compare
from curvlab.monitor import monitor
from curvlab.nn import linearize
from curvlab.rows import Rows, gram, jacobian, sqrt_fisher

__all__ = [
    "Advice",
    "Comparison",
    "Rows",
    "__version__",
    "advise",
    "compare",
    "gram",
    "jacobian",
    "linearize",
    "monitor",
    "sqrt_fisher",
]

__version__ = "0.1.0"
