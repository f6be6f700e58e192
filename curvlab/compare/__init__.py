"""Structures on a user's own model, judged in function space and by real steps."""

from curvlab.compare.comparing import compare
from curvlab.compare.result import Comparison

__all__ = ["Comparison", "compare"]
