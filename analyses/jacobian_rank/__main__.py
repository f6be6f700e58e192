"""Run the analysis: `python -m analyses.jacobian_rank`."""

from analyses.jacobian_rank.analysis import ANALYSIS
from curvlab.study import main

if __name__ == "__main__":
    raise SystemExit(main(ANALYSIS))
