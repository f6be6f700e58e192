"""Run the analysis: `python -m analyses.gnn_natural_gradient`."""

from analyses.gnn_natural_gradient.analysis import ANALYSIS
from curvlab.study import main

if __name__ == "__main__":
    raise SystemExit(main(ANALYSIS))
