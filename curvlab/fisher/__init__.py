"""Structures: approximations of the Fisher matrix with one set of verbs."""

# Importing registers, in the order in which options, tables and figures list the structures.
from curvlab.fisher.full import BlockDiagonal, Full  # isort: skip
from curvlab.fisher.layer_wise import BlockTridiagonal, LayerWise  # isort: skip
from curvlab.fisher.unit_wise import UnitWise  # isort: skip
from curvlab.fisher.diagonal import Diagonal  # isort: skip
from curvlab.fisher.component_wise import ComponentWise  # isort: skip
from curvlab.fisher.kfac import KFAC  # isort: skip
from curvlab.fisher.ekfac import EKFAC  # isort: skip
from curvlab.fisher.sketched import Sketched  # isort: skip
from curvlab.fisher.adaptive_inverse import AdaptiveInverse  # isort: skip
from curvlab.fisher.partial_traces import ColumnScaled, OutputSide, PartialTraces, RankOne  # isort: skip
from curvlab.fisher.traces_diagonal import PartialTracesDiagonal  # isort: skip
from curvlab.fisher.input_side import InputSide  # isort: skip
from curvlab.fisher.block_means import BlockMeans  # isort: skip
from curvlab.fisher.per_layer import PerLayer  # isort: skip
from curvlab.fisher.structure import STRUCTURES, Structure  # isort: skip
from curvlab.fisher.by_key import make, of_theory  # isort: skip
from curvlab.fisher.damping import SolveInfo  # isort: skip
from curvlab.fisher.step import natural_gradient_step  # isort: skip
from curvlab.fisher.reading import OptimizerMatrix, from_optimizer  # isort: skip

__all__ = [
    "EKFAC",
    "KFAC",
    "STRUCTURES",
    "AdaptiveInverse",
    "BlockDiagonal",
    "BlockMeans",
    "BlockTridiagonal",
    "ColumnScaled",
    "ComponentWise",
    "Diagonal",
    "Full",
    "InputSide",
    "LayerWise",
    "OptimizerMatrix",
    "OutputSide",
    "PartialTraces",
    "PartialTracesDiagonal",
    "PerLayer",
    "RankOne",
    "Sketched",
    "SolveInfo",
    "Structure",
    "UnitWise",
    "from_optimizer",
    "make",
    "natural_gradient_step",
    "of_theory",
]
