"""Is the Jacobian of full row rank, and does it stay so? Zhang, Martens & Grosse 2019, claim by claim.

If the outputs of a network can be moved in every direction (full row rank) and the Jacobian hardly changes on the way
(stability), natural gradient converges at a rate that knows nothing of the data. Modules: `config` (options), `setting`
(one network on one problem), `descent` (real parameter steps and what is seen along them), `points` (what
experiments share), `experiments` (their cells, measurements and claims), `panels`.
"""

from analyses.jacobian_rank.analysis import ANALYSIS

__all__ = ["ANALYSIS"]
