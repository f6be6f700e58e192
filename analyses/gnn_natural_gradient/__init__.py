"""Does K-FAC improve graph networks as Izadi, Fang, Stevenson & Lin 2020 say? Every claim, with rivals tuned as carefully.

Modules: `config` (options), `recipe` (hyper-parameters, published and tried), `training` (one run of the published
protocol), `arms` (recipes by name, and what a run of one is judged by), `comparisons` (of arms, of which claims are made),
`experiments` (their cells, measurements and claims), `panels`.
"""

from analyses.gnn_natural_gradient.analysis import ANALYSIS

__all__ = ["ANALYSIS"]
