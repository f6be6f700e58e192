"""Rows of the Jacobian and of the Fisher matrix's square root, factored per layer."""

from curvlab.rows.making import jacobian, sqrt_fisher
from curvlab.rows.rows import Rows, merge
from curvlab.rows.streamed import gram

__all__ = ["Rows", "gram", "jacobian", "merge", "sqrt_fisher"]
