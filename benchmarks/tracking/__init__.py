"""Leading eigenvalues of the Hessian along a training run, beside SciPy's and power iteration: `python -m benchmarks.tracking`."""
