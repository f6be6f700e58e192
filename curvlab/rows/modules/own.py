"""Layers that are not in the table: rows by derivatives of the layer's own forward pass, one sample at a time.

The layer alone is called again, not the model. That is right if its outputs are a function of its inputs, sample by sample; the
guard compares as it does for rules.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import vjp, vmap

from curvlab.errors import UnsupportedModel
from curvlab.nn.functional import called_with
from curvlab.nn.hooks import has_forward_hooks
from curvlab.rows.layer import DenseRows, LayerRows
from curvlab.rows.modules.rule import Inputs, LayerUse, Rule


def is_own(module: nn.Module) -> bool:
    """Whether a module is a layer of somebody's own: parameters, no modules inside, and no hook that would see single samples."""
    return (
        bool(module._parameters)
        and not module._modules
        and not type(module).__module__.startswith("torch.nn.")
        and not isinstance(module, nn.ParameterList | nn.ParameterDict)
        and not has_forward_hooks(module)
    )


def _rows(use: LayerUse, inputs: Inputs, g: Tensor) -> LayerRows:
    """Return rows `[V, N, …]`, formed; sample by sample where torch cannot vectorise the layer.

    Raises:
        UnsupportedModel: the layer cannot be called on a single sample.
    """
    try:
        found = _vectorised(use, inputs, g)
    except torch.OutOfMemoryError:
        raise
    except Exception:  # What a layer of somebody's own raises under vmap is not known.
        try:
            found = _one_by_one(use, inputs, g)
        except RuntimeError as failure:
            raise UnsupportedModel(
                f"The parameters {', '.join(use.names.values())} have no factored rows, and dense ones could not be formed by "
                f"calling {type(use.module).__name__} on single samples, which the first axis of its inputs and outputs must "
                f"number: {failure}. In training they can be left to the plain gradient, by plain={tuple(use.names.values())}."
            ) from failure
    named = {name: found[local].flatten(0, 1) for local, name in use.names.items()}
    joined = use.layout.join(named)
    return DenseRows(use.name, use.layout, joined.view(*g.shape[:2], use.layout.units, use.layout.width))


def _pulled(use: LayerUse, inputs: Sequence[Tensor]) -> Callable[[Tensor], dict[str, Tensor]]:
    """Return the function that brings a gradient at the output of one sample to the parameters."""
    own = {local: getattr(use.module, local).detach() for local in use.names}

    def output(parameters: dict[str, Tensor]) -> Any:
        return called_with(use.module, parameters, inputs)

    pulled: Any = vjp(output, own)
    return lambda cotangent: pulled[1](cotangent)[0]


def _of_samples(inputs: Inputs) -> list[bool]:
    """Tell inputs with an entry a sample from those that all samples share."""
    return [bool(x.ndim) and len(x) == len(inputs[0]) for x in inputs]


def _vectorised(use: LayerUse, inputs: Inputs, g: Tensor) -> dict[str, Tensor]:
    of_samples = _of_samples(inputs)

    def of_sample(row: Tensor, *sample: Tensor) -> dict[str, Tensor]:
        batch = [x[None] if own else x for x, own in zip(sample, of_samples, strict=True)]
        return _pulled(use, batch)(row[None])

    axes = tuple(0 if own else None for own in of_samples)
    shared = tuple(None for _ in inputs)
    found: dict[str, Tensor] = vmap(vmap(of_sample, in_dims=(0, *axes)), in_dims=(0, *shared))(g, *inputs)
    return found


def _one_by_one(use: LayerUse, inputs: Inputs, g: Tensor) -> dict[str, Tensor]:
    of_samples = _of_samples(inputs)
    found: dict[str, list[Tensor]] = {local: [] for local in use.names}
    for n in range(g.shape[1]):
        pull = _pulled(use, [x[n : n + 1] if own else x for x, own in zip(inputs, of_samples, strict=True)])
        rows = [pull(row[n : n + 1]) for row in g]
        for local, of_parameter in found.items():
            of_parameter.append(torch.stack([row[local] for row in rows]))
    return {local: torch.stack(samples, dim=1) for local, samples in found.items()}


OWN = Rule(lambda _: 1, _rows)
"""The rule of layers that are not in the table."""
