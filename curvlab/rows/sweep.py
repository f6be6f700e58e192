"""What the two engines share: inputs and outputs, and what a sweep leaves behind."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only
from torch.utils.data import DataLoader, Dataset

from curvlab.errors import UnsupportedModel
from curvlab.nn.functional import attributes_kept
from curvlab.nn.modes import as_cast
from curvlab.rows.graph_signature import GraphSignature
from curvlab.rows.layer import LayerRows
from curvlab.rows.packed import is_packed

MakeCotangents = Callable[[Float[Tensor, "N C ..."]], Float[Tensor, "V N C ..."]]
"""Chooses the rows to propagate back, given the model's output."""

PickOutput = Callable[[Any], Tensor] | str | int | None
"""How to find the output tensor in what the model returns: a function, a key or attribute, or an index."""

Arguments = tuple[tuple[Any, ...], dict[str, Any]]
"""Positional and keyword arguments of a model."""


@dataclass(frozen=True)
class SweepResult:
    """Result of one sweep.

    Attributes:
        output: the model's output, as the loss takes it.
        cotangents: rows at the output, in the layout of rows.
        layers: rows of every layer.
        graph_signature: the way of samples through the model.
        graph: the output with its graph, in the layout of rows, where rows of such a pass are always compared.
    """

    output: Float[Tensor, "L C ..."]
    cotangents: Float[Tensor, "V N C ..."]
    layers: tuple[LayerRows, ...]
    graph_signature: GraphSignature
    graph: Float[Tensor, "M C ..."] | None = None


def structural_twin(model: nn.Module, trained: Mapping[str, bool] | None = None) -> nn.Module:
    """Copy the module tree; the copy's Parameters and buffers share the storage of the original's.

    Args:
        model: any module.
        trained: which parameters of the copy require gradients; as in the model if None.
    """
    shared: dict[int, Any] = {id(buffer): buffer for buffer in model.buffers()}
    for name, parameter in model.named_parameters():
        flag = parameter.requires_grad if trained is None else trained[name]
        shared[id(parameter)] = nn.Parameter(parameter.detach(), requires_grad=flag)
    return copy.deepcopy(model, shared)


@contextmanager
def left_as_found(model: nn.Module) -> Iterator[None]:
    """Give every module back the attributes and buffers that it had before the block, and buffers their numbers."""
    buffers = [(buffer, buffer._version, buffer.clone()) for buffer in model.buffers()]
    try:
        with attributes_kept(model):
            yield
    finally:
        with torch.no_grad():
            for buffer, version, numbers in buffers:
                if buffer._version != version:
                    buffer.copy_(numbers)


def as_arguments(inputs: Any) -> Arguments:
    """Unpack a tuple into arguments, a mapping into keywords; anything else is one argument. Tensors are `detached`.

    Raises:
        ValueError: for data that come in batches, and for arrays that are no tensors.
    """
    if isinstance(inputs, DataLoader | Dataset):
        raise ValueError(
            f"inputs are those of one batch, got a {type(inputs).__name__}. Take one, as in inputs, targets = next(iter(loader)); "
            "curvlab.gram and the fit of a structure take all batches of a loader."
        )
    if hasattr(inputs, "__array_interface__"):
        raise ValueError("inputs are a NumPy array: pass torch.as_tensor(inputs), in the type of the parameters.")
    if isinstance(inputs, Mapping):
        unpacked: Arguments = (), dict(inputs)
    else:
        unpacked = inputs if isinstance(inputs, tuple) and not is_packed(inputs) else (inputs,), {}
    return detached(unpacked)


def detached(arguments: Arguments) -> Arguments:
    """Detach tensors, so that no backward pass reaches what the user computed them from."""
    found: Arguments = tree_map_only(Tensor, lambda x: savable(x).detach().requires_grad_(x.requires_grad), arguments)
    return found


def savable(x: Tensor) -> Tensor:
    """Return a tensor that a graph can save for its backward pass: a copy of one that was made in inference mode."""
    return x.clone() if x.is_inference() else x


def select_output(result: Any, pick: PickOutput) -> Tensor:
    """Pick the output tensor from what a model returned.

    Raises:
        UnsupportedModel: if that is no floating-point tensor with a sample and an output axis.
        ValueError: if there is nothing to pick.
    """
    if callable(pick):
        result = pick(result)
    elif pick is not None:
        result = _entry(result, pick)
    if not isinstance(result, Tensor):
        raise UnsupportedModel(
            f"The model returned a {type(result).__name__}; say with output= which tensor in it to use "
            "(a key, an attribute, an index or a function)."
        )
    if result.ndim < 2:
        raise UnsupportedModel(
            f"The model's output has shape {tuple(result.shape)}; curvlab needs [N, C] or [N, C, …]. "
            "Use output=lambda z: z[:, None] for one output a sample, and inputs[None] for a sample that stands alone."
        )
    if not result.is_floating_point():
        raise UnsupportedModel(f"The model's output is {result.dtype}; curvlab needs a floating-point type.")
    return result


def _entry(result: Any, pick: str | int) -> Any:
    try:
        by_attribute = isinstance(pick, str) and not isinstance(result, Mapping)
        return getattr(result, str(pick)) if by_attribute else result[pick]
    except (AttributeError, IndexError, KeyError, TypeError) as error:
        held = f" with {', '.join(map(str, result))}" if isinstance(result, Mapping) else ""
        raise ValueError(
            f"output={pick!r} does not pick anything from the {type(result).__name__}{held} that the model returned."
        ) from error


def call(model: nn.Module, arguments: Arguments, pick: PickOutput) -> Float[Tensor, "N C ..."]:
    """Call the model and pick its output.

    Raises:
        UnsupportedModel: see `select_output`.
        ValueError: if there are no samples, or the output is not finite; names the first sample.
    """
    args, kwargs = arguments
    with as_cast():
        z = select_output(model(*args, **kwargs), pick)
    if z.shape[0] == 0:
        raise ValueError("The inputs hold zero samples.")
    if not torch.isfinite(z).all():
        sample = int((~torch.isfinite(z)).flatten(1).any(1).nonzero()[0])
        raise ValueError(
            f"The model's output is not finite, first at sample {sample}: check its inputs and parameters."
        )
    return z


@contextmanager
def differentiable_recurrence(model: nn.Module) -> Iterator[None]:
    """Keep recurrent networks from cuDNN, which has no derivative of them in eval mode."""
    enabled = torch.backends.cudnn.enabled
    torch.backends.cudnn.enabled = enabled and not any(isinstance(module, nn.RNNBase) for module in model.modules())
    try:
        yield
    finally:
        torch.backends.cudnn.enabled = enabled


@contextmanager
def unhooked(tensors: Iterable[Any]) -> Iterator[None]:
    """Keep hooks on parameters, of those tensors that have any, from changing what a sweep brings to them."""
    found = [x._backward_hooks for x in tensors if isinstance(x, Tensor) and x._backward_hooks]
    held = [(hooks, dict(hooks)) for hooks in found]
    for hooks in found:
        hooks.clear()
    try:
        yield
    finally:
        for hooks, content in held:
            hooks.update(content)


def in_parameter_order(names: Iterable[str], layers: Iterable[LayerRows]) -> tuple[LayerRows, ...]:
    """Sort layers by their first parameter in an order of names."""
    order = {name: i for i, name in enumerate(names)}
    return tuple(sorted(layers, key=lambda layer: min(order[name] for name in layer.layout.names)))


def check_finite(sweep_result: SweepResult) -> None:
    """Raise `ValueError` for rows that are not finite; names the first layer and its first sample."""
    for layer in sweep_result.layers:
        check_all_finite(layer.name, layer.sample_factors)
        check_rows_finite(layer)


def check_rows_finite(layer: LayerRows) -> None:
    """Raise `ValueError` if the factors of a layer that carry the row index are not finite."""
    check_all_finite(layer.name, [rows.transpose(0, 1) for rows in layer.row_factors])


def check_all_finite(name: str, factors: Iterable[Tensor]) -> None:
    """Raise `ValueError` if factors of a layer's rows, with samples on the first axis, are not finite."""
    for factor in factors:
        if factor.is_floating_point() and not (factor.sum().isfinite() or factor.isfinite().all()):
            sample = int((~factor.isfinite()).flatten(1).any(1).nonzero()[0])
            raise ValueError(
                f"The derivative at layer {name!r} is not finite, first at sample {sample}, although the "
                "output is: a function there has no derivative or overflows."
            )
