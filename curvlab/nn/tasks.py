"""Sums of losses on different outputs of one model, where some samples may lack some targets."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor, nn

from curvlab.nn.losses import checked_reduction


@dataclass(frozen=True)
class Task:
    """A loss on some of the outputs.

    Attributes:
        loss: with reduction="sum"; `MultiTask` divides.
        outputs: which, as a slice of the axis C.
        weight: by which the loss is multiplied, at least 0.
    """

    loss: nn.Module
    outputs: slice
    weight: float = 1.0


@dataclass(frozen=True)
class Labelled:
    """What a task sees of a batch: the M samples or positions that have a target.

    Attributes:
        name: of the task.
        task: its loss, outputs and weight.
        channels: its outputs, as a slice with start and stop.
        z: outputs `[M, C_t, *]`.
        targets: as the loss takes them.
        place: brings tensors `[M, ·, *]` back to `[N, ·, *]`, zero where there is no target.
    """

    name: str
    task: Task
    channels: slice
    z: Tensor
    targets: Any
    place: Callable[[Tensor], Tensor]


class MultiTask(nn.Module):
    """A weighted sum of losses on different outputs: `Σ_t α_t Σ_n m_tn ℓ_t(z_n[outputs_t], y_tn) / N`.

    Targets are a mapping by task. Each entry is what the task's loss takes, or a pair of that and a mask that says which
    samples `[N]`, or which positions `[N, *]` of outputs `[N, C, *]`, have a target. Entries without one may hold anything,
    NaN too. A model with several heads is used with `output=lambda heads: torch.cat([heads["a"], heads["b"]], 1)`.

    Args:
        tasks: by name.
        reduction: "mean" divides by the number of samples N, whatever the masks are, so that batches of equal size weigh
            the same; "sum" does not divide.

    Raises:
        ValueError: There is no task, one has a name that modules cannot have, a weight is negative, outputs of two tasks overlap
            or have a step, a task's loss is not a sum, or the reduction is neither "mean" nor "sum".
    """

    def __init__(self, tasks: Mapping[str, Task], reduction: str = "mean") -> None:
        super().__init__()
        self.reduction = checked_reduction(self, reduction)
        unfit = next((name for name in tasks if not name or "." in name or hasattr(nn.ModuleDict, name)), None)
        if unfit is not None:
            raise ValueError(f"MultiTask: a task cannot be called {unfit!r}, as no module can: choose another name.")
        self.losses = nn.ModuleDict({name: task.loss for name, task in tasks.items()})
        self.tasks = dict(tasks)
        if not tasks:
            raise ValueError("MultiTask: there is no task.")
        for name, task in tasks.items():
            if getattr(task.loss, "reduction", None) != "sum":
                raise ValueError(
                    f"MultiTask: the {type(task.loss).__name__} of task {name!r} needs reduction='sum'; the sum of all "
                    "tasks is divided by the number of samples."
                )
            if not task.weight >= 0:
                raise ValueError(f"MultiTask: the weight of task {name!r} must be at least 0, not {task.weight}.")
            if task.outputs.step not in (None, 1):
                raise ValueError(f"MultiTask: the outputs of task {name!r} have a step; use consecutive ones.")

    def forward(self, outputs: Tensor, targets: Mapping[str, Any]) -> Tensor:
        """Return the loss of outputs `[N, C, *]`."""
        parts = [part.task.weight * part.task.loss(part.z, part.targets) for part in self.labelled(outputs, targets)]
        total = torch.stack(parts).sum()
        return total / len(outputs) if self.reduction == "mean" else total

    def labelled(self, outputs: Tensor, targets: Mapping[str, Any]) -> Iterator[Labelled]:
        """Cut outputs and targets into tasks.

        Raises:
            ValueError: Targets miss a task or are of an unknown one, outputs of tasks overlap or are empty, or a mask does
                not fit.
        """
        if not isinstance(targets, Mapping) or set(targets) != set(self.tasks):
            held = sorted(targets) if isinstance(targets, Mapping) else type(targets).__name__
            raise ValueError(f"MultiTask needs a mapping of targets for the tasks {sorted(self.tasks)}, got {held}.")
        taken: dict[int, str] = {}
        for name, task in self.tasks.items():
            start, stop, _ = task.outputs.indices(outputs.shape[1])
            for channel in range(start, stop):
                if channel in taken:
                    raise ValueError(f"Output {channel} belongs to the tasks {taken[channel]!r} and {name!r}; use one.")
                taken[channel] = name
            if start >= stop:
                raise ValueError(f"Task {name!r} has none of the {outputs.shape[1]} outputs.")
            given = targets[name]
            z = outputs[:, start:stop]
            y, mask = given if isinstance(given, tuple | list) else (given, None)
            yield Labelled(name, task, slice(start, stop), *_choose(name, z, y, mask))


def _choose(
    name: str, z: Tensor, targets: Tensor, mask: Bool[Tensor, "N ..."] | None
) -> tuple[Tensor, Tensor, Callable[[Tensor], Tensor]]:
    """Keep the samples or positions that have a target."""
    if mask is None:
        return z, targets, lambda tensor: tensor
    samples, positions = z.shape[:1], (len(z), *z.shape[2:])
    if mask.dtype != torch.bool or tuple(mask.shape) not in (tuple(samples), positions):
        raise ValueError(
            f"The mask of task {name!r} must be bools of shape {list(samples)} or {list(positions)}, got "
            f"{list(mask.shape)} {mask.dtype}."
        )
    if mask.ndim == 1:

        def place(tensor: Tensor) -> Tensor:
            full = tensor.new_zeros(len(mask), *tensor.shape[1:])
            full[mask] = tensor
            return full

        return z[mask], targets[mask], place

    def spread(tensor: Tensor) -> Tensor:
        full = tensor.new_zeros(*mask.shape, tensor.shape[1])
        full[mask] = tensor.flatten(1)
        return full.flatten(1, -2).transpose(1, 2)

    def entries(tensor: Tensor) -> Tensor:
        return tensor.movedim(1, -1)[mask] if tensor.ndim == z.ndim else tensor[mask]

    return entries(z), entries(targets), spread
