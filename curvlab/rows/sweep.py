"""What the two engines share: owners of parameters, inputs and outputs, and the check of a sweep."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
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
from curvlab.rows.modules import RULES, Names, layout_of, rule_for, supported_layers
from curvlab.rows.parameters import Layout

Seed = Callable[[Float[Tensor, "N C ..."]], Float[Tensor, "V N C ..."]]
"""Chooses the rows to propagate back, given the model's output."""

PickOutput = Callable[[Any], Tensor] | str | int | None
"""How to find the output tensor in what the model returns: a function, a key or attribute, or an index."""

Arguments = tuple[tuple[Any, ...], dict[str, Any]]
"""Positional and keyword arguments of a model."""


@dataclass(frozen=True, eq=False)
class Owner:
    """A module with trainable parameters of its own.

    Attributes:
        module: the module.
        name: its name in the model, empty for the model itself.
        names: local names of its trainable parameters to their names in the model; a tied parameter is listed by its
            first owner only.
        tied: whether another module uses one of its parameters, too.
    """

    module: nn.Module
    name: str
    names: Names
    tied: bool

    @property
    def layout(self) -> Layout:
        """How the parameters are laid out in units."""
        return layout_of(self.module, self.names)


@dataclass(frozen=True)
class Swept:
    """Result of one sweep.

    Attributes:
        output: the model's output, as the loss takes it.
        seeds: rows at the output, in the layout of rows.
        layers: rows of every layer.
    """

    output: Float[Tensor, "L C ..."]
    seeds: Float[Tensor, "V N C ..."]
    layers: tuple[LayerRows, ...]


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the trainable parameters, in `named_parameters()` order; raises `UnsupportedModel` if there are none."""
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not parameters:
        raise UnsupportedModel("The model has no trainable parameter: set requires_grad on those to analyse.")
    return parameters


def owners_of(model: nn.Module, *, fixed: bool = True, without: Collection[str] = ()) -> list[Owner]:
    """List the modules that own trainable parameters, in the order of the parameters.

    Args:
        model: any module.
        fixed: whether to refuse modules in training mode that make the model random or let samples interact.
        without: names of parameters to leave out.

    Raises:
        UnsupportedModel: if a torch.nn module without a rule owns one, or a module cannot be treated in its mode.
    """
    names = {id(p): name for name, p in trainable(model).items() if name not in without}
    users: dict[int, int] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                users[id(parameter)] = users.get(id(parameter), 0) + 1
    found: list[Owner] = []
    seen: set[int] = set()
    for name, module in model.named_modules():
        if fixed:
            _check_mode(module, name)
        _check_settings(module, name)
        own = {k: p for k, p in module._parameters.items() if p is not None and id(p) in names}
        fresh = {k: names[id(p)] for k, p in own.items() if id(p) not in seen}
        if not own:
            continue
        _check_supported(module, name)
        seen.update(id(p) for p in own.values())
        if fresh:
            tied = len(fresh) < len(own) or any(users[id(p)] > 1 for p in own.values())
            found.append(Owner(module, name, fresh, tied))
    return found


def _check_mode(module: nn.Module, name: str) -> None:
    normalises = isinstance(module, nn.modules.batchnorm._BatchNorm)
    drops = isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0
    if (normalises or drops) and module.training:
        raise UnsupportedModel(
            f"{type(module).__name__} {name!r} is in training mode, so the model is not a fixed function of each "
            "sample. Call model.eval() first."
        )
    if normalises and module.running_mean is None:
        raise UnsupportedModel(
            f"{type(module).__name__} {name!r} has no running statistics, so samples interact and rows per sample do "
            "not exist. Build it with track_running_stats=True."
        )


def _check_settings(module: nn.Module, name: str) -> None:
    rule = rule_for(module)
    if rule is not None and rule.check is not None:
        rule.check(module, name)


def _check_supported(module: nn.Module, name: str) -> None:
    from_torch = type(module).__module__.startswith("torch.nn.modules")
    covered = isinstance(module, tuple(RULES)) or type(module) in (
        nn.Module,
        nn.ParameterList,
        nn.ParameterDict,
    )
    if from_torch and not covered:
        raise UnsupportedModel(
            f"Layer {name!r} is a {type(module).__name__}, for which curvlab has no rule. Freeze it with "
            f"requires_grad_(False), or use one of: {', '.join(supported_layers())}, bare parameters."
        )


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
    """Give every module back the attributes and buffers that it had before the block."""
    found = [(holder, dict(holder)) for module in model.modules() for holder in (vars(module), module._buffers)]
    try:
        yield
    finally:
        for holder, content in found:
            holder.clear()
            holder.update(content)


def as_arguments(inputs: Any) -> Arguments:
    """Unpack a tuple into arguments, a mapping into keywords; anything else is one argument.

    Tensors are detached, so that no backward pass reaches what the user computed them from.
    """
    if isinstance(inputs, Mapping):
        unpacked: Arguments = (), dict(inputs)
    else:
        unpacked = inputs if isinstance(inputs, tuple) else (inputs,), {}
    detached: Arguments = tree_map_only(Tensor, lambda x: x.detach().requires_grad_(x.requires_grad), unpacked)
    return detached


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


def in_parameter_order(model: nn.Module, layers: Iterable[LayerRows]) -> tuple[LayerRows, ...]:
    """Sort layers by their first parameter."""
    order = {name: i for i, name in enumerate(trainable(model))}
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


def check_sweep(
    model: nn.Module,
    forward: Callable[[], Float[Tensor, "N C ..."]],
    swept: Swept,
    engine: str,
    once_for: nn.Module,
) -> None:
    """Compare random combinations of rows with one reverse pass, once for a model (`once_for`) and shape.

    One pass catches sequence-first inputs, reshaped batches, weights that are used twice, and samples that interact.

    Raises:
        UnsupportedModel: naming the layers whose rows are wrong.
    """
    parameters = trainable(model)
    key = (
        engine, swept.seeds.shape, swept.output.dtype, tuple(parameters), model.training,
        tuple(layer.factors[0].shape for layer in swept.layers),
    )  # fmt: skip
    if key in _checked.setdefault(once_for, set()):
        return
    with torch.enable_grad():
        z = forward()
    if check_rows(parameters, z, swept.seeds, swept.layers):
        _checked[once_for].add(key)


def check_rows(
    parameters: Mapping[str, Tensor],
    z: Float[Tensor, "M C ..."],
    seeds: Float[Tensor, "V M C ..."],
    layers: Sequence[LayerRows],
) -> bool:
    """Compare random combinations of rows with one reverse pass through a graph, which is kept.

    Returns:
        Whether that told anything: not if all seeds are zero.

    Raises:
        UnsupportedModel: naming the layers whose rows are wrong.
    """
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(layers[0].shape, generator=generator, dtype=torch.float64).to(z)
    with torch.enable_grad():
        # A zero term ties outputs that depend on no parameter, or not on all, to the graph.
        zero = sum(p.sum() * 0 for p in parameters.values())
        # A model may fold positions into the first axis of its output.
        positions = len(z) // w.shape[1]
        cotangent = torch.einsum("vm,vm...->m...", w.repeat_interleave(positions, 1), seeds)
        reference = torch.autograd.grad(z + zero, list(parameters.values()), cotangent, retain_graph=True)
    expected = {name: g.to_dense() if g.is_sparse else g for name, g in zip(parameters, reference, strict=True)}
    eps = torch.finfo(z.dtype).eps
    # Gradients that cancel exactly, such as a shift before a softmax, are round-off at the scale of what cancels.
    round_off = 100 * eps * max(float(g.norm()) for g in (cotangent, *expected.values()))
    wrong = []
    for layer in layers:
        coefficients = w.reshape(1, -1).to(layer.dtype)
        for name, value in layer.layout.split(layer.rmatvec(coefficients)[0]).items():
            error = float((value - expected[name]).norm())
            if not error <= round_off + eps**0.5 * float(expected[name].norm()):
                wrong.append(name)
    if wrong:
        raise UnsupportedModel(
            f"Rows per sample do not reproduce the gradient of {', '.join(wrong)}. Either samples interact, or the "
            "first axis of the layer's input is not the sample (sequence-first inputs, reshaped batches, positions "
            "shared by all samples), or a weight is used outside its layer's forward pass, or the model is random. "
            "Make the first axis the sample and call each layer on a whole batch; where samples are the nodes of a graph, "
            "say with nodes= which of them carry rows."
        )
    return bool(cotangent.any())
