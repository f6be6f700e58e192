"""Is curvature block-diagonal, does the error of a matrix predict that of a step, and how unlike are the blocks?

Every number states its partition: layers, tensors, units (neurons and tokens), heads or classes. Modules: `config` (options),
`points` (cells and sources of claims), `setting` (a network in training, its matrices), `partitions` (Adam-mini's blocks and
others within tensors), `spectra` (densities and their distances), `steps` (best steps), `optimiser` (Adam-mini),
`differences` (Hessian by differences of gradients), `quadratics`, `experiments`, `panels`.
"""

from analyses.block_structure.analysis import ANALYSIS

__all__ = ["ANALYSIS"]
