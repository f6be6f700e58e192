"""Rows of the Jacobian and of the Fisher matrix's square root, factored per layer."""

from curvlab.rows.rows import Rows, jacobian, merge, sqrt_fisher

__all__ = ["Rows", "jacobian", "merge", "sqrt_fisher"]
