"""The experiments of the analysis, one a file."""
