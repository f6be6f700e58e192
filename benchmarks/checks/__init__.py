"""What checks of rows add to training steps: `python -m benchmarks.checks`."""
