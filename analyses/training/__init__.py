"""Does training with a structure of the Fisher matrix need fewer steps than tuned first order, and less time?

Every structure against SGD with momentum, Adam, AdamW and Muon, each tuned over as many configurations, and judged on fresh
seeds; what single ingredients of K-FAC add; and the theory's rates through the same optimiser. Modules: `config` (options),
`tasks` (what is to be reached), `methods` (the optimisers and their configurations), `run` (one training run), `tuning` (the
choice among configurations), `parts` (experiments: their cells, measurements and claims), `figures`.
"""

from analyses.training.analysis import ANALYSIS

__all__ = ["ANALYSIS"]
