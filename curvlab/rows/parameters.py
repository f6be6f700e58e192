"""How parameters are named, shaped and laid out.

Parameters travel as `dict[name, Tensor]` with the names of `model.named_parameters()`. Inside a layer they form one
matrix of shape `[units, width]`: a row holds what belongs to one unit. For `Linear(in, out)` with a bias the
matrix is `[out, in + 1]`, the last column being the bias; for `LayerNorm(c)` it is `[c, 2]`, columns scale and shift;
for `Embedding(n, d)` it is `[n, d]`; a bare parameter is one row. Flattened, units outermost, the matrix is the layer's
*block vector* `[P_l]`.

Weights of transposed convolutions, `[Q·I, O, *kernel]` for Q groups, are stored with their inputs first; their units are
output channels `(q, o)` nevertheless.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from curvlab.errors import unknown_name
from curvlab.tools.shown import line, some

Parameters = Mapping[str, Tensor]
Vector = Parameters | Tensor


@dataclass(frozen=True)
class Slot:
    """The columns `[start, stop)` of a layer's matrix that one parameter fills.

    Attributes:
        name: the parameter.
        shape: its shape.
        start: its first column.
        stop: the column after its last one.
        input_first: number of groups of a parameter `[groups·inputs, outputs, …]`, 0 for one with its units first.
    """

    name: str
    shape: torch.Size
    start: int
    stop: int
    input_first: int = 0

    def columns(self, value: Tensor, units: int) -> Float[Tensor, "... units width"]:
        """Lay out the parameter, or tensors of its shape behind leading axes, as columns of the layer's matrix."""
        lead = value.shape[: value.ndim - len(self.shape)]
        if self.input_first:
            value = value.reshape((*lead, self.input_first, -1, self.shape[1], self.shape[2:].numel())).transpose(
                -3, -2
            )
        return value.reshape((*lead, units, self.stop - self.start))

    def parameter(self, matrix: Float[Tensor, "... units width"]) -> Tensor:
        """Take the parameter from the layer's matrix."""
        return self.shaped(matrix[..., self.start : self.stop])

    def shaped(self, value: Float[Tensor, "... units width"]) -> Tensor:
        """Give the parameter's columns its shape."""
        lead = value.shape[:-2]
        if self.input_first:
            value = value.reshape((*lead, self.input_first, self.shape[1], -1, self.shape[2:].numel())).transpose(
                -3, -2
            )
        return value.reshape((*lead, *self.shape))


@dataclass(frozen=True)
class Layout:
    """The `[units, width]` matrix that a layer's parameters form."""

    units: int
    width: int
    slots: tuple[Slot, ...]

    @classmethod
    def of(
        cls, units: int, parameters: Mapping[str, torch.Size], input_first: Mapping[str, int] | None = None
    ) -> Layout:
        """Lay parameters side by side, in order; each must have a multiple of `units` elements."""
        slots, start = [], 0
        for name, shape in parameters.items():
            stop = start + shape.numel() // units
            slots.append(Slot(name, shape, start, stop, (input_first or {}).get(name, 0)))
            start = stop
        return cls(units, start, tuple(slots))

    @property
    def size(self) -> int:
        """Number of parameters `P_l`."""
        return self.units * self.width

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the parameters, in column order."""
        return tuple(slot.name for slot in self.slots)

    def split(self, block: Float[Tensor, "... P_l"]) -> dict[str, Tensor]:
        """Cut block vectors into parameters, keeping leading axes."""
        return self.cut(block.reshape(*block.shape[:-1], self.units, self.width))

    def cut(self, matrix: Float[Tensor, "... units width"]) -> dict[str, Tensor]:
        """Cut the layer's matrix into parameters, keeping leading axes."""
        return {slot.name: slot.parameter(matrix) for slot in self.slots}

    def join(self, parameters: Parameters) -> Float[Tensor, "K P_l"]:
        """Assemble block vectors from parameters that carry one leading axis."""
        columns = [slot.columns(parameters[slot.name], self.units) for slot in self.slots]
        return torch.cat(columns, dim=-1).flatten(1)

    def restrict(self, names: Iterable[str]) -> tuple[Layout, list[int]]:
        """Return the layout of some of the parameters, and the columns that they fill here."""
        names = set(names)
        kept = [s for s in self.slots if s.name in names]
        columns = [column for s in kept for column in range(s.start, s.stop)]
        shapes = {s.name: s.shape for s in kept}
        return Layout.of(self.units, shapes, {s.name: s.input_first for s in kept}), columns


@dataclass(frozen=True)
class ParameterSpace:
    """Names and shapes of the trainable parameters, in `named_parameters()` order."""

    shapes: Mapping[str, torch.Size]

    def __repr__(self) -> str:
        return line(self, some(self.shapes), P=self.size)

    @property
    def size(self) -> int:
        """Number of parameters `P`."""
        return sum(shape.numel() for shape in self.shapes.values())

    def unflatten(self, flat: Float[Tensor, "... P"]) -> dict[str, Tensor]:
        """Cut flat vectors into parameters, keeping leading axes."""
        if flat.shape[-1] != self.size:
            raise ValueError(
                f"A flat vector needs {self.size} entries (all trainable parameters), got {flat.shape[-1]}."
            )
        pieces = flat.split([shape.numel() for shape in self.shapes.values()], dim=-1)
        return {
            name: piece.reshape((*flat.shape[:-1], *shape))
            for (name, shape), piece in zip(self.shapes.items(), pieces, strict=True)
        }

    def flatten(self, parameters: Parameters) -> Float[Tensor, "... P"]:
        """Concatenate parameters that share leading axes into flat vectors."""
        return torch.cat(
            [
                parameters[name].flatten(start_dim=parameters[name].ndim - len(shape))
                if len(shape)
                else parameters[name].unsqueeze(-1)
                for name, shape in self.shapes.items()
            ],
            dim=-1,
        )

    def unpack(self, vector: Vector) -> tuple[dict[str, Tensor], Callable[[Mapping[str, Tensor]], Vector]]:
        """Bring a vector, or a block of vectors, into the form `name -> [K, *shape]`.

        Args:
            vector: parameters by name or one flat vector, either with at most one leading axis.

        Returns:
            The parameters with a leading axis, and the function that brings a result back to the form given.
        """
        if isinstance(vector, Tensor):
            if vector.ndim not in (1, 2):
                raise ValueError(f"A flat vector is [P] or [K, P], got shape {tuple(vector.shape)}.")
            blocked = vector.ndim == 2
            named = self.unflatten(vector if blocked else vector[None])

            def restore_flat(result: Mapping[str, Tensor]) -> Vector:
                flat = self.flatten(result)
                return flat if blocked else flat[0]

            return named, restore_flat

        if not isinstance(vector, Mapping):
            raise ValueError(
                f"A vector is a tensor [P] or [K, P], or a mapping by parameter name as dict(model.named_parameters()), got a "
                f"{type(vector).__name__}."
            )
        self._check_names(vector)
        ranks = {name: vector[name].ndim - len(shape) for name, shape in self.shapes.items()}
        if set(ranks.values()) == {0}:
            return (
                {name: vector[name][None] for name in self.shapes},
                lambda result: {name: value[0] for name, value in result.items()},
            )
        for name, shape in self.shapes.items():
            if ranks[name] != 1 or vector[name].shape[1:] != shape:
                raise ValueError(
                    f"Parameter {name!r} has shape {tuple(shape)}; a vector for it needs that shape, or that shape "
                    f"after one leading axis common to all parameters, got {tuple(vector[name].shape)}."
                )
        return {name: vector[name] for name in self.shapes}, lambda result: dict(result)

    def _check_names(self, vector: Parameters) -> None:
        for name in vector:
            if name not in self.shapes:
                raise unknown_name("parameter", name, self.shapes)
        missing = [name for name in self.shapes if name not in vector]
        if missing:
            raise ValueError(f"The vector lacks the parameters {', '.join(missing)}.")
        for name, shape in self.shapes.items():
            if vector[name].shape[vector[name].ndim - len(shape) :] != shape:
                raise ValueError(f"Parameter {name!r} has shape {tuple(shape)}, got {tuple(vector[name].shape)}.")
