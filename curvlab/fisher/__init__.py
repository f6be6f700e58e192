"""Structures: approximations of the Fisher matrix with one set of verbs."""

from curvlab.fisher.diagonal import Diagonal
from curvlab.fisher.ekfac import EKFAC
from curvlab.fisher.full import BlockDiagonal, Full
from curvlab.fisher.kfac import KFAC
from curvlab.fisher.layer_wise import BlockTridiagonal, LayerWise
from curvlab.fisher.structure import STRUCTURES, SolveInfo, Structure
from curvlab.fisher.unit_wise import UnitWise

__all__ = ["EKFAC", "KFAC", "STRUCTURES", "BlockDiagonal", "BlockTridiagonal", "Diagonal", "Full", "LayerWise", "SolveInfo", "Structure", "UnitWise"]
