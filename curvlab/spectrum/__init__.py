"""Spectra of curvature matrices: numerical rank, condition and effective dimension."""

from curvlab.spectrum.rank import Rank, condition_number, effective_dimension, rank

__all__ = ["Rank", "condition_number", "effective_dimension", "rank"]
