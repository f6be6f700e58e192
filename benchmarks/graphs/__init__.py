"""Cost of curvature on graphs: `python -m benchmarks.graphs`."""
