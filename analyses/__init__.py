"""Analyses: one module per theory, each run as `python -m analyses.<name>`."""
