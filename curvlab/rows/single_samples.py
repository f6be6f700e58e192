"""Dense rows of parameters without factored ones: derivatives of the model, called on single samples.

All samples at once by `torch.func` (functorch, now part of torch), or one after the other where it cannot vectorise the model.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import vjp, vmap
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from curvlab.errors import UnsupportedModel
from curvlab.nn.functional import called_with
from curvlab.nn.hooks import has_forward_hooks, unwatched
from curvlab.nn.linearize import differentiable_attention
from curvlab.nn.modes import as_cast
from curvlab.rows.layer import DenseRows, LayerRows
from curvlab.rows.owners import Owner
from curvlab.rows.packed import is_packed, length, taken
from curvlab.rows.reverse import backward
from curvlab.rows.sweep import Arguments, PickOutput, select_output

logger = logging.getLogger("curvlab")

FIXED = (
    ". The model was traced: if it was exported, do so for any number of samples, with dynamic_shapes=({0: "
    "torch.export.Dim('N')},), or use the module that it was exported from, whose layers have factored rows."
)
"""What helps a graph of operations that was recorded for one number of samples."""


def dense_rows(
    model: nn.Module,
    arguments: Arguments,
    pick: PickOutput,
    output: Float[Tensor, "M ..."],
    cotangents: Float[Tensor, "V M ..."],
    samples: int,
    owners: Sequence[Owner],
) -> list[LayerRows]:
    """Rows of single samples, for parameters without a factored form. Memory `R·P` of those.

    All samples at once by `torch.func`, or one after the other if it cannot vectorise the model. Tensors among the
    arguments that do not have N entries are shared by all samples; one that has by chance, if the outputs say so.

    Args:
        model: the model.
        arguments: that it was called on.
        pick: which output.
        output: what it returned.
        cotangents: rows there.
        samples: their number N, of which the output holds one after the other.
        owners: those of the parameters.

    Raises:
        UnsupportedModel: if the model cannot be called on single samples.
    """
    names = ", ".join(name for owner in owners for name in owner.names.values())
    first: dict[str, Tensor] | None = None
    failure: Exception | None = None
    if len(output) % samples:
        raise UnsupportedModel(
            f"The parameters {names} have no factored rows, and the model's output has {len(output)} entries along its first "
            f"axis, which are no equal number for each of {samples} samples. Make the first axis the sample; give positions "
            "that do not count a weight of zero, as by ignore_index, instead of leaving them out."
        )
    z, cotangents = output.unflatten(0, (samples, -1)), cotangents.unflatten(1, (samples, -1))
    for split in _splits(arguments, samples):
        try:
            outputs, rows = _of_samples(model, split, pick, cotangents, owners, names)
        except Exception as error:
            failure = failure or error
            continue
        if _alike(outputs, z):
            return [as_dense(owner, rows, cotangents) for owner in owners]
        first = rows if first is None else first
    if first is None:
        remedy = FIXED if any(isinstance(module, torch.fx.GraphModule) for module in model.modules()) else ""
        raise UnsupportedModel(
            f"The parameters {names} have no factored rows, and dense ones could not be formed by calling the model "
            f"on single samples, which the first axis of all inputs and outputs must number: {failure}{remedy}"
        ) from failure
    return [as_dense(owner, first, cotangents) for owner in owners]


@dataclass(frozen=True)
class _Split:
    """Arguments, flattened, and which of them hold something of every sample on their first axis."""

    leaves: list[Any]
    structure: TreeSpec
    of_samples: tuple[bool, ...]

    def sample(self, n: int) -> Arguments:
        """Return the arguments of one sample."""
        return self.joined(
            [taken(x, slice(n, n + 1)) if own else x for x, own in zip(self.leaves, self.of_samples, strict=True)]
        )

    def joined(self, leaves: Iterable[Any]) -> Arguments:
        """Return leaves as arguments."""
        found: Arguments = tree_unflatten(leaves, self.structure)
        return found


def _splits(arguments: Arguments, N: int) -> Iterator[_Split]:
    """Yield the ways to tell samples' tensors from shared ones: all that can be samples', then all but one."""
    leaves, structure = tree_flatten(arguments, is_leaf=is_packed)
    may = tuple(length(x) == N for x in leaves)
    yield _Split(leaves, structure, may)
    if N > 1 and sum(may) > 1:
        for k in reversed([k for k, own in enumerate(may) if own]):
            yield _Split(leaves, structure, (*may[:k], False, *may[k + 1 :]))


def _alike(outputs: Tensor, z: Tensor) -> bool:
    """Whether outputs of single samples are those of the batch."""
    close = torch.finfo(z.dtype).eps ** 0.5
    return outputs.shape == z.shape and float((outputs - z).norm()) <= close * float(z.norm())


def _of_samples(
    model: nn.Module, split: _Split, pick: PickOutput, cotangents: Tensor, owners: Sequence[Owner], names: str
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return outputs `[N, K, …]`, K being the entries of a sample, and gradients `[V, N, *shape]` by name."""
    if has_forward_hooks(model):
        # Under torch.func it might store a tensor that is dead afterwards.
        logger.info("Rows of %s by one sample after the other, as the model has hooks.", names)
        return _one_by_one(model, split, pick, cotangents, owners)
    try:
        return _vectorised(model, split, pick, cotangents, owners)
    except Exception as error:
        logger.info("Rows of %s by one sample after the other, as torch.func failed: %s", names, error)
        return _one_by_one(model, split, pick, cotangents, owners)


def _vectorised(
    model: nn.Module, split: _Split, pick: PickOutput, cotangents: Tensor, owners: Sequence[Owner]
) -> tuple[Tensor, dict[str, Tensor]]:
    values = {name: parameter.detach() for name, parameter in model.named_parameters()}
    names = [name for owner in owners for name in owner.names.values()]
    own = [x for x, of_samples in zip(split.leaves, split.of_samples, strict=True) if of_samples]

    def of_sample(sample: list[Tensor], cotangent: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        found = iter(sample)
        leaves = [
            next(found)[None] if of_samples else x for x, of_samples in zip(split.leaves, split.of_samples, strict=True)
        ]
        args, kwargs = split.joined(leaves)

        def output(parameters: dict[str, Tensor]) -> Tensor:
            with as_cast():
                return select_output(called_with(model, {**values, **parameters}, args, kwargs), pick)

        pulled = vjp(output, {name: values[name] for name in names})
        return pulled[0], pulled[1](cotangent)[0]

    with warnings.catch_warnings(), differentiable_attention():
        warnings.filterwarnings("ignore", "There is a performance drop")
        # Samples inside rows: in the other order torch's rule of PReLU gives an axis too many.
        z, rows = vmap(lambda row: vmap(of_sample)(own, row))(cotangents)
    return z[0], rows


def _one_by_one(
    model: nn.Module, split: _Split, pick: PickOutput, cotangents: Tensor, owners: Sequence[Owner]
) -> tuple[Tensor, dict[str, Tensor]]:
    parameters: dict[str, Tensor] = {
        name: getattr(owner.module, local) for owner in owners for local, name in owner.names.items()
    }
    found: dict[str, list[Tensor]] = {name: [] for name in parameters}
    outputs = []
    for n in range(cotangents.shape[1]):
        args, kwargs = split.sample(n)
        with torch.enable_grad(), unwatched(model), as_cast():
            z = select_output(model(*args, **kwargs), pick)
        outputs.append(z.detach())
        for (name, p), g in zip(
            parameters.items(), backward(z, list(parameters.values()), cotangents[:, n]), strict=True
        ):
            found[name].append(cotangents.new_zeros(len(cotangents), *p.shape) if g is None else g)
    return torch.stack(outputs), {name: torch.stack(rows, dim=1) for name, rows in found.items()}


def as_dense(owner: Owner, rows: dict[str, Tensor], cotangents: Tensor) -> LayerRows:
    """Lay out gradients `[V, N, *shape]` of an owner's parameters."""
    layout = owner.layout
    joined = layout.join({name: rows[name].flatten(0, 1) for name in layout.names})
    return DenseRows(owner.name, layout, joined.view(*cotangents.shape[:2], layout.units, layout.width))
