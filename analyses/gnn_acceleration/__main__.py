"""Run the analysis: `python -m analyses.gnn_acceleration`."""

from analyses.gnn_acceleration.analysis import ANALYSIS
from curvlab.study import main

if __name__ == "__main__":
    raise SystemExit(main(ANALYSIS))
