"""Run the analysis: `python -m analyses.edge_of_stability`."""

from analyses.edge_of_stability.analysis import ANALYSIS
from curvlab.study import main

if __name__ == "__main__":
    raise SystemExit(main(ANALYSIS))
