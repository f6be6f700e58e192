"""Run the analysis: `python -m analyses.training`."""

from analyses.training.analysis import ANALYSIS
from curvlab.study import main

if __name__ == "__main__":
    raise SystemExit(main(ANALYSIS))
