"""Λ^{1/2} at the output, which turns rows of J into rows of S.

Λ is block-diagonal with one block a position (n, x) of the output. `A`, with `AᵀA = Λ`, is kept in the form that a loss
gives it:

    DiagonalRoot     A = diag(s)                       element-wise losses
    SoftmaxRoot      A = s diag(√p)(I − 1pᵀ)           K = C rows a position, one of which is redundant
    EigenRoot        A = diag(s) Vᵀ                    any other Hessian, by its eigenvectors
    BlockRoot        one of these for every task       sums of losses on different outputs

Rows `(v, n)` with v = (c, x), x innermost, keep their order; row k of a position takes the place of output k.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor

Own = TypeVar("Own", bound="PositionRoot")

Null = tuple[slice, Tensor]
"""Some of the rows v, and unit vectors `[C, N, X]` over them, one a position, that no row of S reaches."""


class OutputRoot(ABC):
    """A matrix A at every position of the output, with `AᵀA = Λ`."""

    @property
    @abstractmethod
    def shape(self) -> tuple[int, int]:
        """`(V, N)`: rows a sample, samples."""

    @abstractmethod
    def apply(self, rows: Float[Tensor, "V N ..."]) -> Float[Tensor, "V N ..."]:
        """Weight rows of J."""

    def columns(self, x: Float[Tensor, "*B Q R"]) -> Float[Tensor, "*B Q R"]:
        """Return `x Aᵀ`."""
        return self._along(x.mT, self.apply).mT

    def compress(self, rows: Float[Tensor, "V N ..."]) -> Float[Tensor, "W N ..."]:
        """Return `Qᵀ` times rows of S, Q an orthonormal basis of a space that holds A's range: fewer rows, if A can spare some."""
        return rows

    def compressed(self, x: Float[Tensor, "*B R Q"]) -> Float[Tensor, "*B W Q"]:
        """Return `Qᵀx`; see `compress`."""
        return self._along(x, self.compress)

    def reduced(self, x: Float[Tensor, "*B R Q"]) -> Float[Tensor, "*B W Q"]:
        """Return `QᵀA x`, for which `(QᵀA)ᵀQᵀA = Λ`, too; see `compress`."""
        return self._along(x, lambda rows: self.compress(self.apply(rows)))

    def _along(self, x: Float[Tensor, "*B R Q"], operation: Callable[[Tensor], Tensor]) -> Float[Tensor, "*B W Q"]:
        return operation(x.movedim(-2, 0).unflatten(0, self.shape)).flatten(0, 1).movedim(0, -2)

    @abstractmethod
    def dual(self, u: Float[Tensor, "K V N"]) -> Float[Tensor, "K V N"]:
        """Return the shortest c with `Aᵀc = u`, for a softmax with u reduced to entries that sum to zero.

        Directions without weight, which no c reaches, are dropped.
        """

    @abstractmethod
    def projector(self) -> Float[Tensor, "V N V"]:
        """Return the projector on the range of A for every sample."""

    @property
    @abstractmethod
    def weighed(self) -> Bool[Tensor, "V N"]:
        """Which rows are not zero for want of weight."""

    @property
    def nulls(self) -> tuple[Null, ...]:
        """Directions of row space that vanish although no row does."""
        return ()

    def inverse(self) -> OutputRoot | None:
        """Return A⁻¹, which turns S back into J, or None if some direction has no weight or there is no such form."""
        return None

    @abstractmethod
    def to(self, dtype: torch.dtype) -> OutputRoot:
        """Convert to another floating-point type."""

    @abstractmethod
    def joined(self, others: Sequence[Any], scales: Sequence[float]) -> OutputRoot:
        """Append the samples of other roots of this form; each root is multiplied by a number."""

    @abstractmethod
    def state(self) -> dict[str, Any]:
        """Return the content in plain containers, for `restored`."""


@dataclass(frozen=True)
class PositionRoot(OutputRoot):
    """A root of one form at all positions; the samples are the axis before the last of every tensor.

    Attributes:
        scale: s, `[C, N, X]`.
    """

    scale: Float[Tensor, "C N X"]

    @property
    def shape(self) -> tuple[int, int]:  # noqa: D102
        C, N, X = self.scale.shape
        return C * X, N

    @abstractmethod
    def _weigh(self, split: Float[Tensor, "C X N ..."]) -> Float[Tensor, "C X N ..."]:
        """Multiply with A; C is the number of outputs."""

    def apply(self, rows: Float[Tensor, "V N ..."]) -> Float[Tensor, "V N ..."]:  # noqa: D102
        C, N, X = self.scale.shape
        return self._weigh(rows.reshape(C, X, N, *rows.shape[2:])).flatten(0, 1)

    def projector(self) -> Float[Tensor, "V N V"]:  # noqa: D102
        C, N, X = self.scale.shape
        found = self.scale.new_zeros(C, X, N, C, X)
        at = torch.arange(X, device=found.device)
        found[:, at, :, :, at] = self._within().permute(3, 0, 2, 1)
        return found.view(C * X, N, C * X)

    def _within(self) -> Float[Tensor, "C K N X"]:
        """Return the projector on the range of A at every position."""
        return torch.diag_embed((self.scale != 0).to(self.scale).movedim(0, -1)).permute(2, 3, 0, 1)

    @property
    def weighed(self) -> Bool[Tensor, "V N"]:  # noqa: D102
        return (self.scale != 0).transpose(1, 2).flatten(0, 1)

    def to(self: Own, dtype: torch.dtype) -> Own:  # noqa: D102
        return replace(self, **{name: value.to(dtype) for name, value in self._tensors().items()})

    def joined(self: Own, others: Sequence[Own], scales: Sequence[float]) -> Own:  # noqa: D102
        parts = [replace(part, scale=part.scale * by) for part, by in zip((self, *others), scales, strict=True)]
        joined = {name: torch.cat([part._tensors()[name] for part in parts], dim=-2) for name in self._tensors()}
        return replace(self, **joined)

    def state(self) -> dict[str, Any]:  # noqa: D102
        return {"form": type(self).__name__, **self._tensors()}

    def _tensors(self) -> dict[str, Tensor]:
        return {item.name: getattr(self, item.name) for item in fields(self)}


@dataclass(frozen=True)
class DiagonalRoot(PositionRoot):
    """A = diag(s)."""

    def _weigh(self, split: Float[Tensor, "C X N ..."]) -> Float[Tensor, "C X N ..."]:
        return split * _spread(self.scale, split)

    def dual(self, u: Float[Tensor, "K V N"]) -> Float[Tensor, "K V N"]:  # noqa: D102
        return _over(u, self.scale.transpose(1, 2).flatten(0, 1))

    def inverse(self) -> DiagonalRoot | None:  # noqa: D102
        return None if bool((self.scale == 0).any()) else DiagonalRoot(self.scale.reciprocal())


@dataclass(frozen=True)
class SoftmaxRoot(PositionRoot):
    """A = s diag(√p)(I − 1pᵀ), the rows of which at a position satisfy `Σ_k √p_k S_k = 0`.

    Attributes:
        sqrt_p: √p, `[C, N, X]`.
    """

    sqrt_p: Float[Tensor, "C N X"]

    def _weigh(self, split: Float[Tensor, "C X N ..."]) -> Float[Tensor, "C X N ..."]:
        mean = (_spread(self.sqrt_p.square(), split) * split).sum(0)
        return (split - mean).mul_(_spread(self.scale * self.sqrt_p, split))

    def compress(self, rows: Float[Tensor, "V N ..."]) -> Float[Tensor, "W N ..."]:
        """Reflect √p, which no row reaches, into the last output, and leave that one out; not the only one."""
        C, N, X = self.sqrt_p.shape
        if C == 1:
            return rows
        split = rows.reshape(C, X, N, *rows.shape[2:])
        weight = _spread(self.sqrt_p[:-1] / (1 + self.sqrt_p[-1]), split[:-1])
        return torch.addcmul(split[:-1], weight, split[-1], value=-1).flatten(0, 1)

    def dual(self, u: Float[Tensor, "K V N"]) -> Float[Tensor, "K V N"]:  # noqa: D102
        C, N, X = self.sqrt_p.shape
        split = u.reshape(-1, C, X, N)
        sqrt_p = self.sqrt_p.transpose(1, 2)
        split = split - sqrt_p.square() * split.sum(1, keepdim=True)
        return _over(split, self.scale.transpose(1, 2) * sqrt_p).flatten(1, 2)

    def _within(self) -> Float[Tensor, "C K N X"]:
        weighted = (self.scale != 0).to(self.scale)
        eye = torch.eye(len(self.scale), dtype=self.scale.dtype, device=self.scale.device)[:, :, None, None]
        return weighted * (eye - self.sqrt_p[:, None] * self.sqrt_p)

    @property
    def weighed(self) -> Bool[Tensor, "V N"]:  # noqa: D102
        return (self.scale * self.sqrt_p != 0).transpose(1, 2).flatten(0, 1)

    @property
    def nulls(self) -> tuple[Null, ...]:  # noqa: D102
        return ((slice(0, self.shape[0]), self.sqrt_p),)


@dataclass(frozen=True)
class EigenRoot(PositionRoot):
    """A = diag(s) Vᵀ with the eigenvectors V and the square roots s of the eigenvalues of Λ.

    Attributes:
        basis: Vᵀ, `[K, C, N, X]` with K = C.
    """

    basis: Float[Tensor, "C K N X"]

    def _weigh(self, split: Float[Tensor, "C X N ..."]) -> Float[Tensor, "C X N ..."]:
        turned = torch.einsum("kcnx,cxn...->kxn...", self.basis, split)
        return turned.mul_(_spread(self.scale, turned))

    def dual(self, u: Float[Tensor, "K V N"]) -> Float[Tensor, "K V N"]:  # noqa: D102
        C, N, X = self.scale.shape
        turned = torch.einsum("kcnx,bcxn->bkxn", self.basis, u.reshape(-1, C, X, N))
        return _over(turned, self.scale.transpose(1, 2)).flatten(1, 2)


@dataclass(frozen=True)
class BlockRoot(OutputRoot):
    """Roots of different losses on different outputs.

    Attributes:
        parts: the rows v of each, and its root.
        total: V; rows that belong to no part are zero.
    """

    parts: tuple[tuple[slice, OutputRoot], ...]
    total: int

    @property
    def shape(self) -> tuple[int, int]:  # noqa: D102
        return self.total, self.parts[0][1].shape[1]

    def apply(self, rows: Float[Tensor, "V N ..."]) -> Float[Tensor, "V N ..."]:  # noqa: D102
        out = torch.zeros_like(rows)
        for at, part in self.parts:
            out[at] = part.apply(rows[at])
        return out

    def compress(self, rows: Float[Tensor, "V N ..."]) -> Float[Tensor, "W N ..."]:  # noqa: D102
        return torch.cat([part.compress(rows[at]) for at, part in self.parts])

    def dual(self, u: Float[Tensor, "K V N"]) -> Float[Tensor, "K V N"]:  # noqa: D102
        out = torch.zeros_like(u)
        for at, part in self.parts:
            out[:, at] = part.dual(u[:, at])
        return out

    def projector(self) -> Float[Tensor, "V N V"]:  # noqa: D102
        found = [part.projector() for _, part in self.parts]
        out = found[0].new_zeros(*self.shape, self.total)
        for (at, _), block in zip(self.parts, found, strict=True):
            out[at, :, at] = block
        return out

    @property
    def weighed(self) -> Bool[Tensor, "V N"]:  # noqa: D102
        out = torch.zeros(self.shape, dtype=torch.bool, device=self.parts[0][1].weighed.device)
        for at, part in self.parts:
            out[at] = part.weighed
        return out

    @property
    def nulls(self) -> tuple[Null, ...]:  # noqa: D102
        return tuple(
            (slice(at.start + rows.start, at.start + rows.stop), null)
            for at, part in self.parts
            for rows, null in part.nulls
        )

    def to(self, dtype: torch.dtype) -> BlockRoot:  # noqa: D102
        return replace(self, parts=tuple((at, part.to(dtype)) for at, part in self.parts))

    def joined(self, others: Sequence[BlockRoot], scales: Sequence[float]) -> BlockRoot:  # noqa: D102
        columns = zip(*(other.parts for other in (self, *others)), strict=True)
        parts = [(same[0][0], same[0][1].joined([part for _, part in same[1:]], scales)) for same in columns]
        return replace(self, parts=tuple(parts))

    def state(self) -> dict[str, Any]:  # noqa: D102
        parts = [(at.start, at.stop, part.state()) for at, part in self.parts]
        return {"form": "BlockRoot", "parts": parts, "total": self.total}


FORMS: dict[str, type[PositionRoot]] = {form.__name__: form for form in (DiagonalRoot, SoftmaxRoot, EigenRoot)}


def restored(state: dict[str, Any]) -> OutputRoot:
    """Return the root whose `state` is given."""
    content = dict(state)
    form = content.pop("form")
    if form != "BlockRoot":
        return FORMS[form](**content)
    parts = tuple((slice(start, stop), restored(part)) for start, stop, part in content["parts"])
    return BlockRoot(parts, content["total"])


def _spread(weight: Float[Tensor, "C N X"], split: Float[Tensor, "C X N ..."]) -> Tensor:
    return weight.transpose(1, 2).reshape(*split.shape[:3], *(1,) * (split.ndim - 3))


def _over(u: Tensor, scale: Tensor) -> Tensor:
    """Divide where there is something to divide by; 0 elsewhere."""
    return torch.where(scale != 0, u / torch.where(scale != 0, scale, 1), 0)
