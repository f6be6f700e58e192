"""Partitions of the parameters, and how much of a symmetric matrix lies outside their diagonal blocks.

    mass    ‖C_bc‖_F² for every pair of blocks                 share  ω = 1 − Σ_b ‖C_bb‖_F² / ‖C‖_F²

Without the matrix: ‖C_bc‖_F² = E‖C_b· z_c‖² for z_c with random signs on block c and zero elsewhere, so that one product gives
a column of the map for all b. Of rows, C = SᵀS, it is ⟨K_b, K_c⟩_F with the Gram matrices K_b = S_bS_bᵀ.

Source: derived; Hutchinson 1990 for the random signs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from math import nan, sqrt

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from curvlab.rows import Rows
from curvlab.rows.parameters import ParameterSpace
from curvlab.rows.rows import gram
from curvlab.spectrum.operator import DenseOperator, Operator, check_operator
from curvlab.tools.generators import source_of
from curvlab.tools.shown import line, some, table

Located = ParameterSpace | Rows | Operator
"""Parameters, or rows or an operator on them."""


@dataclass(frozen=True, eq=False)
class Partition:
    """Which block every parameter belongs to.

    Attributes:
        names: of the blocks.
        labels: index of its block for every entry of a flat vector.
    """

    names: tuple[str, ...]
    labels: Int64[Tensor, " P"]

    def __repr__(self) -> str:
        return line(self, some(self.names), blocks=len(self.names), P=len(self.labels))

    @classmethod
    def of(cls, space: Located, blocks: Callable[[str, torch.Size], Iterable[str]]) -> Partition:
        """Return the partition that puts units of parameters together under names.

        Args:
            space: the parameters, or what is located on them.
            blocks: name and shape of a parameter → a block for every equal part of it, units outermost; one for all of it.
        """
        names: dict[str, int] = {}
        labels = []
        for parameter, shape in (space if isinstance(space, ParameterSpace) else space.space).shapes.items():
            units = [names.setdefault(block, len(names)) for block in blocks(parameter, shape)]
            labels.append(torch.tensor(units, device="cpu").repeat_interleave(shape.numel() // len(units)))
        return cls(tuple(names), torch.cat(labels))

    def __len__(self) -> int:
        return len(self.names)

    def indices(self, block: int) -> Int64[Tensor, " P_b"]:
        """Entries of a block."""
        return (self.labels == block).nonzero()[:, 0]

    def indicator(self, like: Tensor) -> Float[Tensor, "B P"]:
        """One row a block, 1 at its entries, in the type and on the device of a tensor."""
        blocks = torch.arange(len(self), device="cpu")
        return (self.labels == blocks[:, None]).to(like)


def by_layer(space: Located) -> Partition:
    """Return one block a module that has parameters of its own: a weight with its bias, scale and shift of a normalisation."""
    return Partition.of(space, lambda name, _: [layer_of(name)])


def by_tensor(space: Located) -> Partition:
    """Return one block a parameter tensor."""
    return Partition.of(space, lambda name, _: [name])


def by_unit(space: Located, groups: Mapping[str, int] | None = None) -> Partition:
    """Return one block an index of the first axis: a neuron with its bias, a channel, a row of an embedding.

    Args:
        space: the parameters, or rows or an operator on them.
        groups: for some layers, into how many blocks of consecutive units they are cut instead, such as heads.

    Raises:
        ValueError: for a layer whose units are no multiple of its groups.
    """

    def blocks(name: str, shape: torch.Size) -> list[str]:
        layer, units = layer_of(name), shape[0] if len(shape) else 1
        parts = (groups or {}).get(layer, units)
        if units % parts:
            raise ValueError(f"{name!r} has {units} units, which cannot be cut into {parts} groups of equal size.")
        return [f"{layer}[{part}]" for part in range(parts)]

    return Partition.of(space, blocks)


def layer_of(parameter: str) -> str:
    """Return the name of the module that has a parameter; that of a bare parameter of the model is its own."""
    return parameter.rpartition(".")[0] or parameter


@dataclass(frozen=True, eq=False)
class BlockMap:
    """Squared Frobenius norms of all blocks of a symmetric matrix.

    Attributes:
        names: of the blocks.
        mass: ‖C_bc‖_F².
        standard_error: of the share ω; 0 if it is exact.
        products: products with single vectors that it took; 0 if the matrix or rows were at hand.
    """

    names: tuple[str, ...]
    mass: Float[Tensor, "B B"]
    standard_error: float = 0.0
    products: int = 0

    def __repr__(self) -> str:
        off = f"off-block share {self.share:.3g} ± {self.standard_error:.1g}"
        return line(self, some(self.names), off, f"{self.products} products", blocks=len(self.names))

    def _repr_html_(self) -> str:
        rows = ((name, *shares) for name, shares in zip(self.names, self.relative.tolist(), strict=True))
        return table(self, ("", *self.names), rows)

    @property
    def share(self) -> float:
        """ω, the off-block share; NaN of a matrix that is 0."""
        return float(_share_of(self.mass)) if bool(self.mass.any()) else nan

    @property
    def relative(self) -> Float[Tensor, "B B"]:
        """‖C_bc‖_F² / ‖C‖_F²."""
        return self.mass / self.mass.sum()


def block_map(
    operator: Operator, partition: Partition, *, probes: int = 16, generator: torch.Generator | None = None
) -> BlockMap:
    """Return the map of an operator, estimated by random signs; exact if its matrix is at hand or takes no more products.

    Args:
        operator: symmetric in the Euclidean inner product.
        partition: of its parameters.
        probes: random vectors a block, at least 2.
        generator: source of the signs; a fixed seed if None.

    Raises:
        ValueError: for another inner product, a partition of other parameters, or fewer than 2 probes.

    Cost: B products a probe, at most P in all.
    """
    _check(operator, partition)
    if probes < 2:
        raise ValueError(f"probes must be at least 2, got {probes}.")
    if isinstance(operator, DenseOperator):
        return dense_block_map(operator.to_dense(), partition)
    if operator.size <= probes * len(partition):
        return replace(dense_block_map(operator.to_dense(), partition), products=operator.size)
    source = source_of(generator)
    inside = partition.indicator(torch.zeros((), dtype=operator.dtype, device=operator.device))
    drawn = []
    for _ in range(probes):
        signs = 2 * torch.randint(2, (operator.size,), generator=source, device=source.device) - 1
        products = operator.checked_matmat(inside * signs.to(inside))
        drawn.append(inside @ products.square().T)
    each = torch.stack(drawn)
    each = (each + each.mT) / 2
    left_out = torch.stack([_share_of((each.sum(0) - one) / (probes - 1)) for one in each])
    error = sqrt(float((left_out - left_out.mean()).square().sum()) * (probes - 1) / probes)
    return BlockMap(partition.names, each.mean(0), error, probes * len(partition))


def dense_block_map(matrix: Float[Tensor, "P P"], partition: Partition) -> BlockMap:
    """Return the map of a symmetric matrix. Cost B·P² multiply-adds.

    Raises:
        ValueError: for a matrix that is not square, or a partition of another number of parameters.
    """
    if matrix.shape != (len(partition.labels),) * 2:
        raise ValueError(
            f"The partition is one of {len(partition.labels)} parameters, the matrix is {tuple(matrix.shape)}."
        )
    inside = partition.indicator(matrix)
    return BlockMap(partition.names, inside @ matrix.square() @ inside.T)


def rows_block_map(rows: Rows) -> BlockMap:
    """Return the map of SᵀS by the layers of its rows, exact from one Gram matrix a layer. Memory B·R²."""
    kernels = torch.stack([gram([layer], [layer]).flatten() for layer in rows.layers])
    return BlockMap(tuple(layer.name for layer in rows.layers), kernels @ kernels.T)


def diagonal_part(operator: Operator, partition: Partition) -> Operator:
    """Return BD(C), the diagonal blocks of an operator; masked, if its matrix is at hand.

    Cost of a product otherwise: B products with C, as many as there are blocks.

    Raises:
        ValueError: for a partition of other parameters, or another inner product.
    """
    _check(operator, partition)
    if isinstance(operator, DenseOperator):
        labels = partition.labels.to(operator.device)
        return DenseOperator(operator.matrix * (labels[:, None] == labels), operator.space)
    return _DiagonalPart(operator, partition)


class _DiagonalPart(Operator):
    """The diagonal blocks of an operator, by its products with one block of a vector at a time."""

    def __init__(self, operator: Operator, partition: Partition) -> None:
        self.operator, self.partition = operator, partition
        self.space, self.dtype, self.device = operator.space, operator.dtype, operator.device

    def held(self) -> AbstractContextManager[None]:
        return self.operator.held()

    def matmat(self, block: Float[Tensor, "K P"]) -> Float[Tensor, "K P"]:
        inside = self.partition.indicator(block)
        products = self.operator.matmat((inside[:, None] * block).flatten(0, 1))
        return (inside[:, None] * products.view(len(inside), *block.shape)).sum(0)


def _check(operator: Operator, partition: Partition) -> None:
    check_operator(operator)
    if not isinstance(partition, Partition):
        raise ValueError(
            f"partition is one such as by_layer(operator.space), by_tensor or by_unit, got a {type(partition).__name__}."
        )
    if not operator.euclidean:
        raise ValueError(f"{operator!r} is not symmetric in the Euclidean inner product, which its blocks belong to.")
    if len(partition.labels) != operator.size:
        raise ValueError(
            f"The partition is one of {len(partition.labels)} parameters, {operator!r} has {operator.size}."
        )


def _share_of(mass: Float[Tensor, "B B"]) -> Float[Tensor, ""]:
    return 1 - mass.trace() / mass.sum()
