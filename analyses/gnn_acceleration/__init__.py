"""What makes graph networks train fast? Xu, Zhang, Jegelka & Kawaguchi 2021, claim by claim.

Linear graph networks by gradient flow: the paper's bounds with their time-dependent factors, the terms of the speed, and
what skip connections, depth and labels do to it; then the same on ReLU networks. Modules: `config` (options), `setting`
(a graph with its training nodes and propagated features), `flow` (linear models and their paths), `networks` (the same
models in torch, with and without ReLU), `points` (what experiments share), `experiments` (their cells, measurements and
claims), `panels`.
"""

from analyses.gnn_acceleration.analysis import ANALYSIS

__all__ = ["ANALYSIS"]
