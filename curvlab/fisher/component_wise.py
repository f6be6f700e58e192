"""The component-wise Fisher matrix: one block a component of a layer, by any rule that says what the components are."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from curvlab.errors import PartitionError, unknown_name
from curvlab.fisher.block import Block
from curvlab.fisher.diagonal import DiagonalBlock
from curvlab.fisher.full import RowStructure
from curvlab.fisher.row_block import RowBlock
from curvlab.fisher.side import RowSide, Side
from curvlab.fisher.stack import Cut, DenseStack
from curvlab.fisher.unit_wise import UnitBlock
from curvlab.rows import Rows
from curvlab.rows.layer import LayerRows
from curvlab.rows.parameters import Layout, Slot
from curvlab.rows.products import chunks
from curvlab.tools.looks import Look

Labels = Int[Tensor, "units width"]
"""The number of the component to which every entry of a layer's matrix belongs."""

Partition = Callable[[str, Layout], Labels]
"""Returns the labels for the name of a layer and the layout of its matrix."""

FEW_INPUTS = 16
"""Inputs up to which the components of a dense layer are its units in "semantic"."""


def units(_: str, layout: Layout) -> Labels:
    """Return one component a unit."""
    return torch.arange(layout.units, device="cpu")[:, None].expand(-1, layout.width)


def kernels(_: str, layout: Layout) -> Labels:
    """Return one component a kernel, of every output and input channel of a convolution; other parameters are alone."""
    labels = torch.arange(layout.size, device="cpu").view(layout.units, layout.width)
    for slot in layout.slots:
        if _is_convolution(slot, layout):
            own = labels[:, slot.start : slot.stop].unflatten(1, (-1, slot.shape[2:].numel()))
            own.copy_(own[..., :1].clone().expand_as(own))
    return labels


def semantic(name: str, layout: Layout) -> Labels:
    """Return kernels, the weights of units with up to 16 inputs, and all biases of a layer; other parameters are alone.

    A table counts as a dense layer.
    """
    labels = kernels(name, layout)
    weighted = any(len(slot.shape) > 1 for slot in layout.slots)
    for slot in layout.slots:
        own = labels[:, slot.start : slot.stop]
        if len(slot.shape) == 2 and slot.stop - slot.start <= FEW_INPUTS:
            own.copy_(own[:, :1].clone().expand_as(own))
        elif len(slot.shape) == 1 and weighted:
            own.fill_(int(own[0, 0]))
    return labels


def _is_convolution(slot: Slot, layout: Layout) -> bool:
    return len(slot.shape) > 2 and (slot.input_first > 0 or slot.shape[0] == layout.units)


PARTITIONS: Mapping[str, Partition] = {"semantic": semantic, "unit": units, "kernel": kernels}
"""Partitions by name."""


@dataclass(frozen=True)
class Chunks:
    """Components of so many consecutive parameters, in the order of the layer's own; the last one may be smaller."""

    size: int

    def __call__(self, _: str, layout: Layout) -> Labels:
        """Return the labels."""
        places, start = {}, 0
        for slot in layout.slots:
            own = torch.arange(start, start + slot.shape.numel(), dtype=torch.float64, device="cpu")
            places[slot.name], start = own.view(1, *slot.shape), start + len(own)
        return layout.join(places).view(layout.units, layout.width).long() // self.size


@dataclass(frozen=True, eq=False)
class Components(Cut):
    """Components of one size of one layer."""

    index: Int[Tensor, " P_b"]
    count: int

    def rows(self, layers: Sequence[LayerRows]) -> DenseStack:  # noqa: D102
        (layer,) = layers
        return DenseStack(layer.dense()[:, self.index].view(layer.count, self.count, -1).transpose(0, 1).contiguous())

    def moment(self, layers: Sequence[LayerRows]) -> Float[Tensor, "B w w"]:
        """Form `X_bᵀX_b` in chunks of samples. Cost `R·P_b·w` after the rows are formed."""
        (layer,) = layers
        V, N = layer.shape
        width = len(self.index) // self.count
        total = layer.row_factors[-1].new_zeros(self.count, width, width)
        for part in chunks(N, V * layer.size):
            x = self.rows([layer.select(part)]).x
            total.baddbmm_(x.mT, x)
        return total

    def title(self, name: str) -> str:  # noqa: D102
        return f"components of layer {name!r}"


class ComponentWise(
    RowStructure,
    key="component-wise",
    summary="one block of F a component of a layer",
    look=Look("#882255", "h", "component-wise"),
):
    """One block of `F` a component, for any partition of a layer's parameters into components.

    Components of equal size are solved in one batched call, those of a single parameter as a diagonal.

    Args:
        partition: which parameters of a layer belong together. "unit": those of a unit; "kernel": the entries of one
            kernel, for every output and input channel of a convolution, and every other parameter by itself; "semantic":
            kernels, the weights of a dense unit if they are 16 at most, all biases of a layer, and others by themselves
            (Tran et al. 2023); a number k: k consecutive parameters, weights before biases; a function that takes the name
            of a layer and its `Layout` and returns integers `[units, width]`, equal for entries that belong together.
        side: "rows" or "parameters", on which a block is kept and solved; "auto" for the smaller one.
        window: keep the rows of the last `window` batches, each `decay` times the weight of the next.
        rtol: rank tolerance of undamped solves, relative to λ_max; n·ε if None.

    Raises:
        ValueError: at construction for an unknown name, a number below 1, or anything else.
        PartitionError: at the first update, if a function returns anything but integers `[units, width]`.

    Cost: forms the rows of a layer, `R·P_l`, unless components are units, layers or single parameters; then `Σ s²` numbers of
    state and `Σ s³` multiply-adds to factorise components of sizes s.
    Source: Tran, Irvan, Yamaguchi & Nakata 2022; Tran et al. 2023 ("semantic").
    """

    costly = True
    within_layers = True

    def __init__(
        self,
        *,
        partition: str | int | Partition = "semantic",
        side: Side = "auto",
        window: int | None = None,
        rtol: float | None = None,
    ) -> None:
        super().__init__(side=side, window=window, rtol=rtol)
        if isinstance(partition, str) and partition not in PARTITIONS:
            raise unknown_name("partition", partition, PARTITIONS)
        if isinstance(partition, int) and partition < 1:
            raise ValueError(f"partition is a number of parameters ≥ 1, got {partition}.")
        if not (isinstance(partition, str | int) or callable(partition)):
            raise ValueError(
                f"partition is a name ({', '.join(PARTITIONS)}), a number or a function, got {partition!r}. Blocks of whole "
                "parameters are those of BlockDiagonal(partition=…)."
            )
        self._partition = partition

    @property
    def options(self) -> Mapping[str, object]:
        """The configuration."""
        return {"partition": self._partition, **super().options}

    @property
    def _labels_of(self) -> Partition:
        partition = self._partition
        if isinstance(partition, str):
            return PARTITIONS[partition]
        return Chunks(partition) if isinstance(partition, int) else partition

    def _make_blocks(self, rows: Rows) -> list[Block]:
        return [
            block
            for layer in rows.layers
            for block in _blocks(layer.name, layer.layout, self._labels_of, self._config, rows.device)
        ]


def _blocks(name: str, layout: Layout, partition: Partition, config: RowSide, device: torch.device) -> Iterator[Block]:
    """Yield a block for all components of one size."""
    labels = _checked(partition(name, layout), name, layout).cpu()
    _, component, sizes = labels.flatten().unique(return_inverse=True, return_counts=True)
    if len(sizes) == 1:
        yield RowBlock(name, [layout], config)
    elif len(sizes) == layout.units and bool((labels == labels[:, :1]).all()):
        yield UnitBlock(name, layout, config)
    else:
        order = component.argsort(stable=True)
        for size in sizes.unique().tolist():
            index = order[sizes[component[order]] == size].to(device)
            if size == 1:
                yield DiagonalBlock(name, layout, config.rtol, index)
            else:
                yield RowBlock(name, [layout], config, Components(index, len(index) // size))


def _checked(labels: object, name: str, layout: Layout) -> Labels:
    if not isinstance(labels, Tensor) or labels.is_floating_point() or labels.shape != (layout.units, layout.width):
        found = f"{labels.dtype} {list(labels.shape)}" if isinstance(labels, Tensor) else type(labels).__name__
        raise PartitionError(
            f"The partition of layer {name!r} is a tensor of integers [{layout.units}, {layout.width}], a row a unit and the "
            f"columns of {', '.join(layout.names)} side by side; the function returned {found}."
        )
    return labels
