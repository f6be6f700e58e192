"""What the two engines share: inputs and outputs, what a sweep leaves behind, and its check."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from curvlab.errors import UnsupportedModel
from curvlab.rows.layer import LayerRows
from curvlab.rows.owners import trainable
from curvlab.rows.route import Route

Seed = Callable[[Float[Tensor, "N C ..."]], Float[Tensor, "V N C ..."]]
"""Chooses the rows to propagate back, given the model's output."""

PickOutput = Callable[[Any], Tensor] | str | int | None
"""How to find the output tensor in what the model returns: a function, a key or attribute, or an index."""

Arguments = tuple[tuple[Any, ...], dict[str, Any]]
"""Positional and keyword arguments of a model."""


@dataclass(frozen=True)
class Swept:
    """Result of one sweep.

    Attributes:
        output: the model's output, as the loss takes it.
        seeds: rows at the output, in the layout of rows.
        layers: rows of every layer.
        route: the way of samples through the model.
    """

    output: Float[Tensor, "L C ..."]
    seeds: Float[Tensor, "V N C ..."]
    layers: tuple[LayerRows, ...]
    route: Route


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
    found = [(holder, dict(holder)) for module in model.modules() for holder in (vars(module), module._buffers)]
    buffers = [(buffer, buffer._version, buffer.clone()) for buffer in model.buffers()]
    try:
        yield
    finally:
        for holder, content in found:
            holder.clear()
            holder.update(content)
        with torch.no_grad():
            for buffer, version, numbers in buffers:
                if buffer._version != version:
                    buffer.copy_(numbers)


def as_arguments(inputs: Any) -> Arguments:
    """Unpack a tuple into arguments, a mapping into keywords; anything else is one argument. Tensors are `detached`."""
    if isinstance(inputs, Mapping):
        unpacked: Arguments = (), dict(inputs)
    else:
        unpacked = inputs if isinstance(inputs, tuple) else (inputs,), {}
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
            "Use output=lambda z: z[:, None] for one output a sample."
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


def check_finite(swept: Swept) -> None:
    """Raise `ValueError` for rows that are not finite; names the first layer and its first sample."""
    for layer in swept.layers:
        *shared, rows = (factor for factor in layer.factors if factor.is_floating_point())
        for factor in (*shared, rows.transpose(0, 1)):
            if not (factor.sum().isfinite() or factor.isfinite().all()):
                sample = int((~factor.isfinite()).flatten(1).any(1).nonzero()[0])
                raise ValueError(
                    f"The derivative at layer {layer.name!r} is not finite, first at sample {sample}, although the "
                    "output is: a function there has no derivative or overflows."
                )


_checked: WeakKeyDictionary[nn.Module, set[tuple[Any, ...]]] = WeakKeyDictionary()
_unfactored: WeakKeyDictionary[nn.Module, frozenset[str]] = WeakKeyDictionary()


def unfactored(model: nn.Module) -> frozenset[str]:
    """Return the parameters that are used outside their layers, as far as a check has found them."""
    return _unfactored.get(model, frozenset())


@contextmanager
def without_factors(model: nn.Module, wrong: Sequence[str]) -> Iterator[None]:
    """Remember that rows of these parameters do not follow from their layers, if a second attempt succeeds without.

    Raises:
        UnsupportedModel: naming them, if it does not.
    """
    before = unfactored(model)
    _unfactored[model] = before | set(wrong)
    try:
        yield
    except UnsupportedModel:
        _unfactored[model] = before
        refuse(wrong)


def wrong_rows(
    model: nn.Module,
    forward: Callable[[], Float[Tensor, "N C ..."]],
    swept: Swept,
    engine: str,
    once_for: nn.Module,
) -> tuple[str, ...]:
    """Compare random combinations of rows with one reverse pass, once for a model (`once_for`), its graph and shapes.

    One pass catches sequence-first inputs, reshaped batches, weights that are used elsewhere, and samples that interact. It is
    repeated for every batch where samples may move to places that depend on numbers.

    Returns:
        The parameters whose rows are wrong.
    """
    parameters = trainable(model)
    key = (
        engine, swept.seeds.shape, swept.output.dtype, tuple(parameters), model.training, swept.route,
        tuple((layer.name, layer.factors[0].shape) for layer in swept.layers),
    )  # fmt: skip
    if key in _checked.setdefault(once_for, set()):
        return ()
    with torch.enable_grad():
        z = forward()
    wrong, told = compare(parameters, z, swept.seeds, swept.layers)
    if told and not wrong and swept.route.stands_for(swept.seeds.shape[1]):
        _checked[once_for].add(key)
    return wrong


def refuse(wrong: Sequence[str]) -> None:
    """Raise `UnsupportedModel` if there are parameters whose rows are wrong."""
    if wrong:
        raise UnsupportedModel(
            f"Rows per sample do not reproduce the gradient of {', '.join(wrong)}. Either samples interact, or the "
            "first axis of the model's inputs and outputs is not the sample (sequence-first inputs, reshaped batches), or "
            "the model is random. Make the first axis the sample; where samples are the nodes of a graph, say with "
            "nodes= which of them carry rows."
        )


def compare(
    parameters: Mapping[str, Tensor],
    z: Float[Tensor, "M C ..."],
    seeds: Float[Tensor, "V M C ..."],
    layers: Sequence[LayerRows],
) -> tuple[tuple[str, ...], bool]:
    """Compare random combinations of rows with one reverse pass through a graph, which is kept.

    Returns:
        The parameters whose rows are wrong, and whether that told anything: not if all seeds are zero, or not finite.
    """
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(layers[0].shape, generator=generator, dtype=torch.float64, device="cpu").to(z)
    with torch.enable_grad():
        # A zero term ties outputs that depend on no parameter, or not on all, to the graph.
        zero = sum(p.sum() * 0 for p in parameters.values())
        # A model may fold positions into the first axis of its output.
        positions = len(z) // w.shape[1]
        cotangent = torch.einsum("vm,vm...->m...", w.repeat_interleave(positions, 1), seeds)
        with unhooked(parameters.values()):
            reference = torch.autograd.grad(z + zero, list(parameters.values()), cotangent, retain_graph=True)
    expected = {name: g.to_dense() if g.is_sparse else g for name, g in zip(parameters, reference, strict=True)}
    if not all(bool(g.isfinite().all()) for g in (cotangent, *expected.values())):
        return (), False
    eps = max(torch.finfo(tensor.dtype).eps for tensor in (z, *expected.values()))
    # Gradients that cancel exactly, such as a shift before a softmax, are round-off at the scale of what cancels.
    round_off = 100 * eps * max(float(g.norm()) for g in (cotangent, *expected.values()))
    wrong = []
    for layer in layers:
        coefficients = w.reshape(1, -1).to(layer.dtype)
        for name, value in layer.layout.split(layer.rmatvec(coefficients)[0]).items():
            error = float((value - expected[name]).norm())
            if not error <= round_off + eps**0.5 * float(expected[name].norm()):
                wrong.append(name)
    return tuple(wrong), bool(cotangent.any())
