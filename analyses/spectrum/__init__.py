"""Spectra of curvature matrices: top eigenvalues, trace and density, whole and per layer, of Hessian, GGN and structures."""

from analyses.spectrum.analysis import ANALYSIS

__all__ = ["ANALYSIS"]
