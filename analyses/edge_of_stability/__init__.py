"""Does training sharpen up to the edge of stability and stay there? Cohen et al. 2021, claim by claim.

Full-batch training raises the largest Hessian eigenvalue to the value at which the optimiser is just stable on a quadratic,
and then hovers there. Modules: `config` (options), `setting` (one network and its data), `optimisers` (what steps, and the
curvature that its stability depends on), `descent` (a run and what is followed along it), `windows` (what a run says, over
windows that are fixed beforehand), `points` (what experiments share), `experiments` (their cells, measurements
and claims), `panels`.
"""

from analyses.edge_of_stability.analysis import ANALYSIS

__all__ = ["ANALYSIS"]
