"""Processes that hold some samples each, and what they add up or gather of what they make of them.

All calls are collective: every process of the group has to make them, in the same order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace

import torch
from torch import Tensor, distributed

from curvlab.errors import StateError
from curvlab.rows.layer import LayerRows
from curvlab.rows.rows import Rows, batch_row, merge


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
        found = cls.all()
        return found if found.size > 1 else None

    @classmethod
    def all(cls) -> Processes:
        """Return all processes of the run, be it one, of `torch.distributed`, which has to be initialised."""
        return cls(None, distributed.get_rank(), distributed.get_world_size())

    @classmethod
    def of(cls, group: distributed.ProcessGroup | None) -> Processes | None:
        """Return the processes of a group; None for one of this process alone, and if there is none.

        Raises:
            ValueError: if this process is not in the group.
        """
        if group is None:
            return None
        rank, size = distributed.get_rank(group), distributed.get_world_size(group)
        if rank < 0:
            raise ValueError(
                "This process is not in the group that it was given: only those that are may make the call."
            )
        return cls(group, rank, size) if size > 1 else None

    def total(self, tensor: Tensor) -> Tensor:
        """Sum a tensor over the processes."""
        return self.total_(tensor.clone(memory_format=torch.contiguous_format))

    def total_(self, tensor: Tensor) -> Tensor:
        """Sum a contiguous tensor over the processes, in place."""
        distributed.all_reduce(tensor, group=self.group)
        return tensor

    def total_for(self, rank: int) -> Callable[[Tensor], Tensor]:
        """Return the function that sums a tensor over the processes for one of them; what others get has no meaning."""

        def total(tensor: Tensor) -> Tensor:
            summed = tensor.clone(memory_format=torch.contiguous_format)
            distributed.reduce(summed, rank, group=self.group)
            return summed

        return total

    def agree(self, flag: bool, device: torch.device) -> bool:
        """Whether a flag is true in all processes."""
        return bool(self.total(torch.tensor(float(flag), device=device)) == self.size)

    def any(self, flag: bool, device: torch.device) -> bool:
        """Whether a flag is true in any process."""
        return not self.agree(not flag, device)

    @contextmanager
    def together(self) -> Iterator[None]:
        """Let a failure in one process, within the block, end it in all, at the end of the block.

        Raises:
            StateError: if another process has failed, with the message of its error, or has ended or is late.
        """
        try:
            yield
        except Exception as error:
            with suppress(StateError):
                self._told(f"{type(error).__name__}: {error}")
            raise
        said = self._told(None)
        failed = [f"Process {rank} has failed. {what}" for rank, what in enumerate(said) if what is not None]
        if failed:
            raise StateError("\n".join(failed))

    def _told(self, word: str | None) -> list[str | None]:
        """Return what every process tells the others."""
        said: list[str | None] = [None] * self.size
        try:
            if distributed.get_backend(self.group) == "gloo":
                # Says which process is missing.
                distributed.monitored_barrier(self.group, wait_all_ranks=True)
            distributed.all_gather_object(said, word, group=self.group)
        except RuntimeError as error:
            raise StateError(
                "A process has ended, or has not come within the timeout that init_process_group was given: see what it wrote "
                f"last. {error}"
            ) from error
        return said

    def share(self, samples: int, device: torch.device) -> tuple[int, int]:
        """Return where this process' samples start in the batch of all, and how many that has."""
        sizes = [int(count) for count in self._gather(torch.tensor([samples], device=device))]
        return sum(sizes[: self.rank]), sum(sizes)

    def gather(self, rows: Rows) -> Rows:
        """Return the rows of all processes, those of the first one first; one for rows of batches.

        Memory: `R` of the whole batch.
        """
        return self._joined(rows, [self._gather_layer(layer) for layer in rows.layers])

    def gather_for(self, rows: Rows, holders: Mapping[str, int]) -> Rows:
        """Return the rows of all processes, of the layers that this one holds; those of others without numbers.

        Args:
            rows: those of this process.
            holders: ranks by the name of a parameter.
        """
        gathered = {layer: self._gather_layer(layer, holders[layer.layout.names[0]]) for layer in rows.layers}
        own = {layer: parts for layer, parts in gathered.items() if parts}
        whole = self._joined(replace(rows, layers=tuple(own)), list(own.values()))
        found = dict(zip(own, whole.layers, strict=True))
        return replace(whole, layers=tuple(found.get(layer) or layer.without_numbers() for layer in rows.layers))

    def _joined(self, rows: Rows, layers: list[list[LayerRows]]) -> Rows:
        """Put layers of all processes together with the rest of their rows."""
        weights = self._gather_shaped(rows.sample_weights)
        sizes = torch.tensor([rows.count, rows.terms], dtype=torch.float64, device=rows.sample_weights.device)
        numbers = [[float(number) for number in of_process] for of_process in self._gather(sizes)]
        parts = [
            replace(
                rows,
                layers=tuple(of_layer[rank] for of_layer in layers),
                count=numbers[rank][0],
                terms=numbers[rank][1],
                sample_weights=weights[rank],
                root=None,
                _jacobian=None,
            )
            for rank in range(self.size)
        ]
        if not layers:
            return parts[self.rank]
        return batch_row(parts) if rows.per == "batch" else merge(parts)

    def _gather_layer(self, layer: LayerRows, to: int | None = None) -> list[LayerRows]:
        """Gather the rows of a layer, in all processes or in one; nothing in others."""
        factors = [self._gather_shaped(factor, to) for factor in layer.factors]
        return [layer._with_factors(*parts) for parts in zip(*factors, strict=True)]

    def _gather(self, tensor: Tensor, to: int | None = None) -> list[Tensor]:
        """Gather tensors of one shape, in all processes or in one; nothing in others."""
        found = [torch.empty_like(tensor) for _ in range(self.size)] if to in (None, self.rank) else []
        if to is None:
            distributed.all_gather(found, tensor.contiguous(), group=self.group)
        else:
            distributed.gather(tensor.contiguous(), found or None, to, group=self.group)
        return found

    def _gather_shaped(self, tensor: Tensor, to: int | None = None) -> list[Tensor]:
        """Gather tensors of as many axes, such as those of other numbers of samples and positions."""
        shapes = [s.tolist() for s in self._gather(torch.tensor(tensor.shape, device=tensor.device))]
        padded = tensor.new_zeros([max(lengths) for lengths in zip(*shapes, strict=True)])
        padded[tuple(map(slice, tensor.shape))] = tensor
        return [part[tuple(map(slice, shape))] for part, shape in zip(self._gather(padded, to), shapes, strict=False)]


def mean_of_processes(numbers: Tensor) -> Tensor:
    """Return the mean over all processes of the run, which all have to ask for; the numbers themselves in one alone."""
    processes = Processes.present()
    return numbers if processes is None else processes.total(numbers) / processes.size


def spread(costs: Sequence[int | float], processes: int) -> list[int]:
    """Give the dearest task first, each to the process with the least to do."""
    load, owners = [0.0] * processes, [0] * len(costs)
    for task in sorted(range(len(costs)), key=lambda k: -costs[k]):
        owners[task] = min(range(processes), key=load.__getitem__)
        load[owners[task]] += costs[task]
    return owners
