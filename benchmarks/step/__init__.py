"""Training steps of second order, beside plain gradient descent and other libraries: `python -m benchmarks.step`."""
