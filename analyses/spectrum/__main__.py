"""Run the analysis: `python -m analyses.spectrum`."""

from analyses.spectrum.analysis import ANALYSIS
from curvlab.study import main

if __name__ == "__main__":
    raise SystemExit(main(ANALYSIS))
