"""Curvature of language models: `python -m benchmarks.language`."""
