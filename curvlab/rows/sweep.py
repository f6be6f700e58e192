"""What the two engines share: owners of parameters, inputs and outputs, and the check of a sweep."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float
from torch import Tensor, nn

from curvlab.errors import UnsupportedModel
from curvlab.rows.layer import LayerRows
from curvlab.rows.modules import Names, layout_of, rule_for, supported_layers
from curvlab.rows.parameters import Layout

Seed = Callable[[Float[Tensor, "N C ..."]], Float[Tensor, "V N C ..."]]
"""Chooses the rows to propagate back, given the model's output."""

PickOutput = Callable[[Any], Tensor] | str | int | None
"""How to find the output tensor in what the model returns: a function, a key or attribute, or an index."""


@dataclass(frozen=True)
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
    """Result of one sweep: the model's output and the rows of every layer."""

    output: Float[Tensor, "N C ..."]
    seeds: Float[Tensor, "V N C ..."]
    layers: tuple[LayerRows, ...]


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the trainable parameters, in `named_parameters()` order; raises `UnsupportedModel` if there are none."""
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not parameters:
        raise UnsupportedModel("The model has no trainable parameter: set requires_grad on those to analyse.")
    return parameters


def owners_of(model: nn.Module) -> list[Owner]:
    """List the modules that own trainable parameters, in the order of the parameters.

    Raises:
        UnsupportedModel: if a torch.nn module without a rule owns one, or a module cannot be treated in its mode.
    """
    names = {id(p): name for name, p in trainable(model).items()}
    users: dict[int, int] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                users[id(parameter)] = users.get(id(parameter), 0) + 1
    found, seen = [], set()
    for name, module in model.named_modules():
        _check_mode(module, name)
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
    interacting = isinstance(module, nn.modules.batchnorm._BatchNorm | nn.modules.dropout._DropoutNd)
    if interacting and module.training:
        raise UnsupportedModel(
            f"{type(module).__name__} {name!r} is in training mode, so the model is not a fixed function of each sample. "
            "Call model.eval() first."
        )
    rule = rule_for(module)
    if rule is not None:
        rule.check(module, name)


def _check_supported(module: nn.Module, name: str) -> None:
    from_torch = type(module).__module__.startswith("torch.nn.modules")
    container = isinstance(module, nn.ParameterList | nn.ParameterDict)
    if from_torch and not container and rule_for(module) is None:
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


def as_arguments(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Unpack a tuple into arguments, a mapping into keywords; anything else is one argument."""
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    return (inputs if isinstance(inputs, tuple) else (inputs,)), {}


def select_output(result: Any, pick: PickOutput) -> Tensor:
    """Pick the output tensor from what a model returned.

    Raises:
        UnsupportedModel: if that is no tensor with a sample and an output axis.
    """
    if callable(pick):
        result = pick(result)
    elif isinstance(pick, str):
        result = result[pick] if isinstance(result, Mapping) else getattr(result, pick)
    elif pick is not None:
        result = result[pick]
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
    return result


def call(model: nn.Module, inputs: Any, pick: PickOutput) -> Float[Tensor, "N C ..."]:
    """Call the model and pick its output.

    Raises:
        UnsupportedModel: see `select_output`.
        ValueError: if there are no samples, or the output is not finite; names the first sample.
    """
    args, kwargs = as_arguments(inputs)
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


_checked: WeakKeyDictionary[nn.Module, set[tuple[Any, ...]]] = WeakKeyDictionary()


def check_sweep(
    model: nn.Module, inputs: Any, pick: PickOutput, swept: Swept, engine: str, once_for: nn.Module
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
    V, N = swept.seeds.shape[:2]
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(V, N, generator=generator, dtype=torch.float64).to(swept.output)
    with torch.enable_grad():
        z = call(model, inputs, pick)
        cotangent = torch.einsum("vn,vn...->n...", w, swept.seeds)
        reference = torch.autograd.grad(z, list(parameters.values()), cotangent, allow_unused=True)
    expected = dict(zip(parameters, reference, strict=True))
    wrong = []
    for layer in swept.layers:
        got = layer.layout.split(layer.rmatvec(w.reshape(1, -1)))
        for name, value in got.items():
            target = expected[name]
            target = torch.zeros_like(value[0]) if target is None else target
            scale = max(float(target.norm()), float(value.norm()))
            if float((value[0] - target).norm()) > scale * torch.finfo(value.dtype).eps ** 0.5:
                wrong.append(name)
    if wrong:
        raise UnsupportedModel(
            f"Rows per sample do not reproduce the gradient of {', '.join(wrong)}. Either samples interact, or the first "
            "axis of the layer's input is not the sample (sequence-first inputs, reshaped batches), or a weight is used "
            "outside its layer's forward pass. Make the first axis the sample and call each layer on a whole batch."
        )
    _checked[once_for].add(key)
