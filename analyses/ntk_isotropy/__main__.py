"""Run the analysis: `python -m analyses.ntk_isotropy`."""

from analyses.ntk_isotropy.analysis import ANALYSIS
from curvlab.study import main

if __name__ == "__main__":
    raise SystemExit(main(ANALYSIS))
