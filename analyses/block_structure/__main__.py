"""Run the analysis: `python -m analyses.block_structure`."""

from analyses.block_structure.analysis import ANALYSIS
from curvlab.study import main

if __name__ == "__main__":
    raise SystemExit(main(ANALYSIS))
