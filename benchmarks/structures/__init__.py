"""Fit and solve, and responses, of structures beside curvlinops, nngeometry and torch.func: `python -m benchmarks.structures`."""
