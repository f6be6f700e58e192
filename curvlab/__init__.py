"""Curvature analysis of neural networks: exact and approximate Fisher matrices, judged in function space."""
