"""A batch that several processes share: what each gives, and what each gets back.

Every process holds some samples, of which `torch.distributed` adds up or gathers what the curvature is made of. All hold
the same structure afterwards, so that all take the same step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, distributed

from curvlab.fisher.inverse import Inverse, from_dense
from curvlab.fisher.moment import Factor, inverses
from curvlab.rows import Rows, merge
from curvlab.rows.layer import LayerRows
from curvlab.rows.rows import batch_row


@dataclass(frozen=True)
class Processes:
    """The processes of a group.

    Attributes:
        group: the group; None for all processes.
        rank: number of this one.
        size: how many there are.
    """

    group: distributed.ProcessGroup | None
    rank: int
    size: int

    @classmethod
    def present(cls) -> Processes | None:
        """Return all processes of the run, or None if this is the only one."""
        if not (distributed.is_available() and distributed.is_initialized()):
            return None
        size = distributed.get_world_size()
        return cls(None, distributed.get_rank(), size) if size > 1 else None

    def total(self, tensor: Tensor) -> Tensor:
        """Sum a tensor over the processes."""
        summed = tensor.clone()
        distributed.all_reduce(summed, group=self.group)
        return summed

    def agree(self, flag: bool, device: torch.device) -> bool:
        """Whether a flag is true in all processes."""
        return bool(self.total(torch.tensor(float(flag), device=device)) == self.size)

    def share(self, samples: int, device: torch.device) -> tuple[int, int]:
        """Return where this process' samples start in the batch of all, and how many that has."""
        counts = self._gather(torch.tensor([samples], device=device))
        sizes = [int(count) for count in counts]
        return sum(sizes[: self.rank]), sum(sizes)

    def gather(self, rows: Rows) -> Rows:
        """Return the rows of all processes, those of the first one first; one for rows of batches.

        Memory: `R` of the whole batch.
        """
        numbers = self._gather(torch.tensor([rows.count, rows.terms], dtype=torch.float64, device=rows.device))
        weights = self._gather_samples(rows.sample_weights, 0)
        layers = [self._gather_layer(layer) for layer in rows.layers]
        join = batch_row if rows.per == "batch" else merge
        return join(
            [
                replace(
                    rows,
                    layers=tuple(parts[rank] for parts in layers),
                    count=float(numbers[rank][0]),
                    terms=float(numbers[rank][1]),
                    sample_weights=weights[rank],
                    root=None,
                    _jacobian=None,
                )
                for rank in range(self.size)
            ]
        )

    def _gather_layer(self, layer: LayerRows) -> list[LayerRows]:
        factors = [self._gather_samples(factor, 0) for factor in layer.sample_factors]
        factors += [self._gather_samples(factor, 1) for factor in layer.row_factors]
        return [layer._with_factors(*parts) for parts in zip(*factors, strict=True)]

    def _gather(self, tensor: Tensor) -> list[Tensor]:
        """Gather tensors of one shape."""
        found = [torch.empty_like(tensor) for _ in range(self.size)]
        distributed.all_gather(found, tensor.contiguous(), group=self.group)
        return found

    def _gather_samples(self, tensor: Tensor, axis: int) -> list[Tensor]:
        """Gather tensors that differ in the number of samples."""
        moved = tensor.movedim(axis, 0)
        sizes = [int(size) for size in self._gather(torch.tensor([len(moved)], device=tensor.device))]
        padded = moved.new_zeros(max(sizes), *moved.shape[1:])
        padded[: len(moved)] = moved
        return [part[:size].movedim(0, axis) for part, size in zip(self._gather(padded), sizes, strict=True)]

    def inverses(self, wanted: Sequence[tuple[Factor, Tensor]], uses: int) -> list[Inverse]:
        """Invert factors as `curvlab.fisher.moment.inverses`, each in one process and shared, costs spread evenly."""
        shapes = [factor.shape for factor, _ in wanted]
        owners = _spread([shape[-1] ** (3 if len(shape) == 3 else 1) for shape in shapes], self.size)
        mine = iter(inverses([pair for pair, owner in zip(wanted, owners, strict=True) if owner == self.rank], uses))
        found = []
        for (_, rho), shape, owner in zip(wanted, shapes, owners, strict=True):
            inverse = next(mine).dense().contiguous() if owner == self.rank else rho.new_empty(shape)
            distributed.broadcast(inverse, owner, group=self.group)
            found.append(from_dense(inverse))
        return found


def own_share(samples: int, device: torch.device) -> tuple[int, int]:
    """Return where this process' samples start in the batch of all processes, and how many that has."""
    processes = Processes.present()
    return (0, samples) if processes is None else processes.share(samples, device)


def _spread(costs: Sequence[int], processes: int) -> list[int]:
    """Give the dearest task first, each to the process with the least to do."""
    load, owners = [0] * processes, [0] * len(costs)
    for task in sorted(range(len(costs)), key=lambda k: -costs[k]):
        owners[task] = min(range(processes), key=load.__getitem__)
        load[owners[task]] += costs[task]
    return owners
