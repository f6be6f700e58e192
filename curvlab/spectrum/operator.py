"""Symmetric operators that are known by their products with blocks of vectors.

A block is `[K, P]`, one vector a row, P the number of parameters; vectors may also come by parameter name, as everywhere
in curvlab. An operator is symmetric in the inner product ⟨x, y⟩ = xᵀMy that its `metric` defines, M = I unless it says
otherwise.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import numpy as np
import torch
from jaxtyping import Float, Shaped
from scipy.sparse.linalg import LinearOperator
from torch import Tensor

from curvlab.rows import Rows
from curvlab.rows.parameters import ParameterSpace, Vector

DENSE_BLOCK = 64
"""Columns that `to_dense` computes at once."""


class Operator(ABC):
    """A symmetric linear map on the space of some parameters.

    Attributes:
        space: names and shapes of the parameters.
        dtype: floating-point type of vectors and products.
        device: where they live.
    """

    space: ParameterSpace
    dtype: torch.dtype
    device: torch.device
    euclidean: bool = True
    """Whether M = I."""

    @property
    def size(self) -> int:
        """Number of parameters P."""
        return self.space.size

    @abstractmethod
    def matmat(self, block: Float[Tensor, "K P"]) -> Float[Tensor, "K P"]:
        """Multiply a block of vectors."""

    def checked_matmat(self, block: Float[Tensor, "K P"]) -> Float[Tensor, "K P"]:
        """Multiply a block of vectors; raises ValueError if the product is not finite."""
        return self._checked(self.matmat(block))

    def _checked(self, product: Float[Tensor, "K P"]) -> Float[Tensor, "K P"]:
        if not bool(product.sum().isfinite()):
            raise ValueError(f"A product with {self!r} is not finite: check its parameters and data.")
        return product

    def adjoint(self, block: Float[Tensor, "K P"]) -> Float[Tensor, "K P"]:
        """Multiply a block of vectors with the transpose.

        Raises:
            NotImplementedError: the operator is symmetric in another inner product than the Euclidean one, and does not say
                what its transpose is.
        """
        if not self.euclidean:
            raise NotImplementedError(
                f"{type(self).__name__} is symmetric in the inner product of M only, so its transpose is another operator; "
                "whoever writes it, implement Operator.adjoint."
            )
        return self.matmat(block)

    def metric(self, block: Float[Tensor, "K P"]) -> Float[Tensor, "K P"]:
        """Multiply a block with M."""
        return block

    def project(self, block: Float[Tensor, "K P"]) -> Float[Tensor, "K P"]:
        """Project a block on the subspace that the operator lives on: all of it, unless M is singular."""
        return block

    def held(self) -> AbstractContextManager[None]:
        """Return a context within which the operator is not to change, so that products may share work."""
        return nullcontext()

    def matvec(self, vector: Vector) -> Vector:
        """Multiply a vector, or a block of vectors, flat or by parameter name; the result has the form given."""
        named, restore = self.space.unpack(vector)
        if isinstance(vector, Tensor):
            return self.matmat(vector) if vector.ndim == 2 else self.matmat(vector[None])[0]
        return restore(self.space.unflatten(self.matmat(self.space.flatten(named))))

    def to_dense(self) -> Float[Tensor, "P P"]:
        """Form the matrix, in the order of the flat vectors. Cost P products, memory `P²`.

        Raises:
            ValueError: if it is not finite.
        """
        eye = torch.eye(self.size, dtype=self.dtype, device=self.device)
        return torch.cat([self.checked_matmat(part) for part in eye.split(DENSE_BLOCK)]).T

    def scipy(self) -> LinearOperator:
        """Return the operator for SciPy, on vectors of the same floating-point type in the host's memory."""

        def on_columns(
            product: Callable[[Tensor], Tensor], block: Shaped[np.ndarray, P * K]
        ) -> Shaped[np.ndarray, P * K]:
            vectors = torch.as_tensor(np.ascontiguousarray(block.T), dtype=self.dtype, device=self.device)
            return product(vectors.reshape(-1, self.size)).cpu().numpy().T.reshape(block.shape)

        forward = partial(on_columns, self.matmat)
        transposed = partial(on_columns, self.adjoint)
        dtype = torch.zeros((), dtype=self.dtype, device="cpu").numpy().dtype
        return LinearOperator(
            (self.size, self.size), matvec=forward, matmat=forward, rmatvec=transposed, rmatmat=transposed, dtype=dtype
        )

    def __repr__(self) -> str:
        return f"{type(self).__name__}(P={self.size}, dtype={self.dtype}, device={self.device})"


class DenseOperator(Operator):
    """A symmetric matrix as an operator.

    Args:
        matrix: symmetric.
        space: the parameters that its rows stand for; one nameless vector if None.

    Raises:
        ValueError: if the matrix is not square or does not fit the parameters.
    """

    def __init__(self, matrix: Float[Tensor, "P Q"], space: ParameterSpace | None = None) -> None:
        self.space = space or ParameterSpace({"vector": torch.Size([len(matrix)])})
        if matrix.shape != (self.size, self.size):
            raise ValueError(f"A matrix for {self.size} parameters is square, got {tuple(matrix.shape)}.")
        self.matrix = matrix
        self.dtype, self.device = matrix.dtype, matrix.device

    def matmat(self, block: Float[Tensor, "K P"]) -> Float[Tensor, "K P"]:  # noqa: D102
        return block @ self.matrix

    def to_dense(self) -> Float[Tensor, "P P"]:
        """Return the matrix itself, the product with the identity; raises ValueError if it is not finite."""
        return self._checked(self.matrix)


class RowsOperator(Operator):
    """`SᵀS` for rows S that are at hand. Cost of a product: that of `Rows.matvec` and `Rows.rmatvec`, no sweep."""

    def __init__(self, rows: Rows) -> None:
        self.rows = rows
        self.space, self.dtype, self.device = rows.space, rows.dtype, rows.device

    def matmat(self, block: Float[Tensor, "K P"]) -> Float[Tensor, "K P"]:  # noqa: D102
        return self.space.flatten(self.rows.rmatvec(self.rows.matvec(block)))


def check_operator(operator: object) -> None:
    """Refuse what is no operator.

    Raises:
        ValueError: with the operator to make of it.
    """
    if isinstance(operator, Operator):
        return
    makers = {Rows: "RowsOperator(rows)", Tensor: "DenseOperator(matrix)"}
    maker = next((text for kind, text in makers.items() if isinstance(operator, kind)), None)
    if maker is None and hasattr(operator, "solve"):
        maker = "StructureOperator(structure)"
    raise ValueError(
        f"An operator is needed, got a {type(operator).__name__}: pass curvlab.spectrum."
        f"{maker or 'Hessian(model, loss, data), GGN or Fisher'}."
    )
