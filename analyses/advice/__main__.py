"""Run the analysis: `python -m analyses.advice`."""

from analyses.advice.analysis import ANALYSIS
from curvlab.study import main

if __name__ == "__main__":
    raise SystemExit(main(ANALYSIS))
