"""Does K-FAC improve graph networks as Izadi, Fang, Stevenson & Lin 2020 say? Every claim, with rivals tuned as carefully.

Modules: `config` (options), `recipe` (hyper-parameters, published and tried), `training` (one run of the published
protocol), `selection` (the choice of a configuration on validation data), `parts` (experiments: their cells, measurements
and claims), `figures`.
"""

from analyses.gnn_natural_gradient.analysis import ANALYSIS

__all__ = ["ANALYSIS"]
