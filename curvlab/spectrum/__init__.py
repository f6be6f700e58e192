"""Spectra of curvature matrices: operators, eigenpairs, density, trace and determinant, numerical rank, mass by blocks."""

from curvlab.spectrum.autodiff import GGN, Hessian
from curvlab.spectrum.blocks import (
    BlockMap,
    Partition,
    block_map,
    by_layer,
    by_tensor,
    by_unit,
    diagonal_part,
    rows_block_map,
)
from curvlab.spectrum.density import Density, density, logdet
from curvlab.spectrum.eigen import Eigenpairs, NotConverged, eigenpairs
from curvlab.spectrum.estimates import DiagonalEstimate, Estimate, diagonal, trace
from curvlab.spectrum.fisher import Fisher
from curvlab.spectrum.operator import DenseOperator, Operator, RowsOperator
from curvlab.spectrum.preconditioned import (
    DiagonalPreconditioner,
    Preconditioned,
    StructureOperator,
    SupportsSolve,
)
from curvlab.spectrum.rank import Rank, condition_number, effective_dimension, rank

__all__ = [
    "GGN",
    "BlockMap",
    "DenseOperator",
    "Density",
    "DiagonalEstimate",
    "DiagonalPreconditioner",
    "Eigenpairs",
    "Estimate",
    "Fisher",
    "Hessian",
    "NotConverged",
    "Operator",
    "Partition",
    "Preconditioned",
    "Rank",
    "RowsOperator",
    "StructureOperator",
    "SupportsSolve",
    "block_map",
    "by_layer",
    "by_tensor",
    "by_unit",
    "condition_number",
    "density",
    "diagonal",
    "diagonal_part",
    "effective_dimension",
    "eigenpairs",
    "logdet",
    "rank",
    "rows_block_map",
    "trace",
]
