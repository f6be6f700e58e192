"""Training with structures: a preconditioner of any optimiser, and natural gradient."""

from curvlab.optim.checkpoint import ByLayer
from curvlab.optim.natural_gradient import NaturalGradient
from curvlab.optim.preconditioner import Preconditioner
from curvlab.optim.quadratic import LevenbergMarquardt

__all__ = ["ByLayer", "LevenbergMarquardt", "NaturalGradient", "Preconditioner"]
