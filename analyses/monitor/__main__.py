"""Run the analysis: `python -m analyses.monitor`."""

from analyses.monitor.analysis import ANALYSIS
from curvlab.study import main

if __name__ == "__main__":
    raise SystemExit(main(ANALYSIS))
