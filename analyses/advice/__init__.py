"""Does the advice of `curvlab.advise` hold: does it train without divergence, and how far is it from tuning at ten times the cost?

Modules: `config` (options), `arms` (how an optimiser is chosen), `trial` (training with it), `experiment` (what is measured and
claimed), `panels`. Results of a run on three problems at three seeds come with the package, in `stored`.
"""

from analyses.advice.analysis import ANALYSIS

__all__ = ["ANALYSIS"]
