"""Does training with a structure of the Fisher matrix need fewer steps than tuned first order, and less time?

Every structure against SGD with momentum, Adam, AdamW and Muon, each tuned over as many configurations, and judged on fresh
seeds; curvlab's optimisers as they are by default, untuned, against the same; what single ingredients of K-FAC and parts of the
default add; and checks that the optimiser keeps the theory's rates. Modules: `config` (options), `races` (what is to be
reached), `methods` (what is compared), `run` (one training run), `entrants` (who takes part, and in which configuration),
`comparison` and `ingredients` (what is claimed of whom), `experiments`, `panels`.
"""

from analyses.training.analysis import ANALYSIS

__all__ = ["ANALYSIS"]
