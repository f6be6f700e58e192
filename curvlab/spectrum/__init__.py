"""Spectra of curvature matrices: operators, eigenpairs, density, trace and determinant, numerical rank."""

from curvlab.spectrum.autodiff import GGN, Hessian
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
    "Preconditioned",
    "Rank",
    "RowsOperator",
    "StructureOperator",
    "SupportsSolve",
    "condition_number",
    "density",
    "diagonal",
    "effective_dimension",
    "eigenpairs",
    "logdet",
    "rank",
    "trace",
]
