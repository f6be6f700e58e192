"""Growth of Gram matrix and K-FAC with samples, outputs, width and depth: `python -m benchmarks.growth`."""
