"""The BackPACK engine: an extension that keeps the back-propagated rows.

BackPACK propagates the cotangents through a chain of modules; where its own extensions would form `[V, N, *parameter]`, the
rules here hand the rows at the layer's output to the table of layers. The extension is called on one module after the
other, from the output on, instead of from the backward hooks of a gradient that nobody needs. It runs on a structural
twin of the model, as BackPACK leaves attributes on modules and parameters: the twin has Parameters of its own that
share the storage of the user's.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from backpack import hook_store_io
from backpack.core.derivatives.basederivatives import BaseDerivatives
from backpack.core.derivatives.batchnorm_nd import BatchNormNdDerivatives
from backpack.core.derivatives.conv1d import Conv1DDerivatives
from backpack.core.derivatives.conv2d import Conv2DDerivatives
from backpack.core.derivatives.conv3d import Conv3DDerivatives
from backpack.core.derivatives.conv_transpose1d import ConvTranspose1DDerivatives
from backpack.core.derivatives.conv_transpose2d import ConvTranspose2DDerivatives
from backpack.core.derivatives.conv_transpose3d import ConvTranspose3DDerivatives
from backpack.core.derivatives.dropout import DropoutDerivatives
from backpack.core.derivatives.elu import ELUDerivatives
from backpack.core.derivatives.embedding import EmbeddingDerivatives
from backpack.core.derivatives.leakyrelu import LeakyReLUDerivatives
from backpack.core.derivatives.linear import LinearDerivatives
from backpack.core.derivatives.logsigmoid import LogSigmoidDerivatives
from backpack.core.derivatives.relu import ReLUDerivatives
from backpack.core.derivatives.selu import SELUDerivatives
from backpack.core.derivatives.sigmoid import SigmoidDerivatives
from backpack.core.derivatives.tanh import TanhDerivatives
from backpack.extensions.mat_to_mat_jac_base import MatToJacMat
from backpack.extensions.secondorder.base import SecondOrderBackpropExtension
from backpack.extensions.secondorder.sqrt_ggn import flatten, padding, pooling
from backpack.extensions.secondorder.sqrt_ggn.base import SqrtGGNBaseModule
from backpack.extensions.secondorder.sqrt_ggn.custom_module import SqrtGGNScaleModule
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from curvlab.errors import UnsupportedModel
from curvlab.nn import GraphNetwork, NodesLast, NTKLinear, Propagation
from curvlab.nn.modes import as_cast
from curvlab.rows.graph_signature import GraphSignature
from curvlab.rows.modules import is_batch
from curvlab.rows.owners import owners_of, trainable
from curvlab.rows.passes import ModelInputs
from curvlab.rows.products import distinct
from curvlab.rows.reverse import cotangents_at
from curvlab.rows.sweep import (
    MakeCotangents,
    PickOutput,
    SweepResult,
    in_parameter_order,
)


class _LinearDerivatives(LinearDerivatives):  # type: ignore[misc]
    """Derivatives of a linear layer: one matrix product, of one sample where all have the same rows."""

    def _jac_t_mat_prod(
        self,
        module: nn.Linear | NTKLinear,
        g_inp: Any,  # noqa: ARG002
        g_out: Any,  # noqa: ARG002
        mat: Tensor,
        subsampling: list[int] | None = None,  # noqa: ARG002
    ) -> Tensor:
        rows = distinct(mat) @ module.weight.detach()
        if isinstance(module, NTKLinear):
            rows = rows * module.weight_scale
        return rows.expand(-1, mat.shape[1], *rows.shape[2:])


class _TransposedProduct(BaseDerivatives):  # type: ignore[misc]
    """Derivatives of a linear map without parameters, which a module knows itself."""

    def _jac_t_mat_prod(
        self,
        module: Propagation | NodesLast,
        g_inp: Any,  # noqa: ARG002
        g_out: Any,  # noqa: ARG002
        mat: Tensor,
        subsampling: list[int] | None = None,  # noqa: ARG002
    ) -> Tensor:
        return module.transposed(mat)


class _KeepRows(MatToJacMat):  # type: ignore[misc]
    """Propagates through a layer and keeps the rows at its output."""

    def __init__(self, derivatives: BaseDerivatives, parameters: tuple[str, ...]) -> None:
        super().__init__(derivatives, params=list(parameters))

    def weight(self, ext: _RowsExtension, module: Any, *arguments: Any) -> None:
        """Record the input and the back-propagated rows, the last argument, under the module."""
        ext.kept[module] = (module.input0.detach(), arguments[-1])

    bias = weight


class _Elementwise(MatToJacMat):  # type: ignore[misc]
    """Propagates through an elementwise function, in the memory of the rows where nothing else needs them."""

    def backpropagate(
        self,
        ext: _RowsExtension,
        module: nn.Module,
        grad_inp: Any,
        grad_out: Any,
        backproped: Tensor,
    ) -> Tensor:
        """Multiply with the function's derivative."""
        slope = self.derivatives.df(module, grad_inp, grad_out)
        return backproped * slope if ext.is_shared(backproped) else backproped.mul_(slope)


_PARAMETRISED: dict[type[nn.Module], MatToJacMat] = {
    nn.Linear: _KeepRows(_LinearDerivatives(), ("weight", "bias")),
    NTKLinear: _KeepRows(_LinearDerivatives(), ("weight", "bias")),
    nn.Conv1d: _KeepRows(Conv1DDerivatives(), ("weight", "bias")),
    nn.Conv2d: _KeepRows(Conv2DDerivatives(), ("weight", "bias")),
    nn.Conv3d: _KeepRows(Conv3DDerivatives(), ("weight", "bias")),
    nn.ConvTranspose1d: _KeepRows(ConvTranspose1DDerivatives(), ("weight", "bias")),
    nn.ConvTranspose2d: _KeepRows(ConvTranspose2DDerivatives(), ("weight", "bias")),
    nn.ConvTranspose3d: _KeepRows(ConvTranspose3DDerivatives(), ("weight", "bias")),
    nn.BatchNorm1d: _KeepRows(BatchNormNdDerivatives(), ("weight", "bias")),
    nn.BatchNorm2d: _KeepRows(BatchNormNdDerivatives(), ("weight", "bias")),
    nn.Embedding: _KeepRows(EmbeddingDerivatives(), ("weight",)),
}

_PARAMETERLESS: dict[type[nn.Module], MatToJacMat] = {
    nn.ReLU: _Elementwise(ReLUDerivatives()),
    nn.Sigmoid: _Elementwise(SigmoidDerivatives()),
    nn.Tanh: _Elementwise(TanhDerivatives()),
    nn.LeakyReLU: _Elementwise(LeakyReLUDerivatives()),
    nn.LogSigmoid: _Elementwise(LogSigmoidDerivatives()),
    nn.ELU: _Elementwise(ELUDerivatives()),
    nn.SELU: _Elementwise(SELUDerivatives()),
    nn.Flatten: flatten.SqrtGGNFlatten(),
    nn.Identity: SqrtGGNScaleModule(),
    nn.Dropout: _Elementwise(DropoutDerivatives()),
    nn.MaxPool1d: pooling.SqrtGGNMaxPool1d(),
    nn.MaxPool2d: pooling.SqrtGGNMaxPool2d(),
    nn.ZeroPad2d: padding.SqrtGGNZeroPad2d(),
    Propagation: SqrtGGNBaseModule(_TransposedProduct()),
    NodesLast: SqrtGGNBaseModule(_TransposedProduct()),
}

_CONTAINERS = (nn.Sequential, GraphNetwork)


_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class _RowsExtension(SecondOrderBackpropExtension):  # type: ignore[misc]
    """Propagates cotangents and keeps, for every layer of the table, its input and the rows at its output."""

    def __init__(self) -> None:
        super().__init__("curvlab_rows", {**_PARAMETRISED, **_PARAMETERLESS})
        self.kept: dict[nn.Module, tuple[Tensor, Tensor]] = {}
        self._cotangents: Tensor | None = None

    def is_shared(self, rows: Tensor) -> bool:
        """Whether rows are one sample's for all, or the cotangents; layers keep what reaches them, but hand on what is new."""
        assert self._cotangents is not None
        mine, cotangents = rows.untyped_storage(), self._cotangents.untyped_storage()
        return 0 in rows.stride() or mine.data_ptr() == cotangents.data_ptr()

    def propagate(self, chain: Sequence[Any], cotangents: Tensor) -> None:
        """Bring rows at the output of a chain of called modules to the layers that gradients reach."""
        *_, last = chain
        self._cotangents = cotangents
        self.saved_quantities.save_quantity(
            last.output.data_ptr(), cotangents, self.accumulate_backpropagated_quantities
        )
        for module in reversed(chain):
            if module.output.requires_grad:
                self(module, (), ())


def obstacle(model: nn.Module, pick: PickOutput) -> str | None:
    """Say why BackPACK cannot propagate rows through a model, or return None if it can.

    It can through (nested) `Sequential` chains of modules that it knows, each used once and none in place, and a `GraphNetwork`.
    """
    if pick is not None:
        return "output= picks from what the model returns"
    used: set[nn.Module] = set()
    for name, module in model.named_modules(remove_duplicate=False):
        where = f"{type(module).__name__} {name!r}"
        if "forward" in vars(module) or any(getattr(module, hooks) for hooks in _HOOKS):
            return f"{where} has hooks or a forward pass of its own"
        if type(module) in _CONTAINERS:
            continue
        if type(module) not in _PARAMETRISED and type(module) not in _PARAMETERLESS:
            return f"{where} is not in BackPACK's chain rules"
        if module in used:
            return f"{where} is used more than once"
        if getattr(module, "inplace", False):
            return f"{where} works in place"
        if getattr(module, "padding_mode", "zeros") != "zeros" or isinstance(getattr(module, "padding", 0), str):
            return f"{where} pads by {module.padding_mode!r}, {module.padding!r}"
        if isinstance(module, nn.Flatten) and module.start_dim <= 0:
            return f"{where} may fold positions into the axis of samples"
        if not getattr(module, "affine", True):
            return f"{where} has no scale and shift"
        used.add(module)
    held = [id(p) for module in used for p in module._parameters.values() if p is not None and p.requires_grad]
    if len(set(held)) < len(held):
        return "parameters are tied"
    return None


def sweep(model: nn.Module, inputs: ModelInputs, make_cotangents: MakeCotangents) -> SweepResult:
    """Propagate the cotangents with BackPACK and keep the rows factored, of a model without an `obstacle`."""
    twin = _twin(model)
    owners = owners_of(twin)
    samples = inputs.samples
    detached = replace(inputs, arguments=tree_map_only(Tensor, Tensor.detach, inputs.arguments))
    chain = [module for module in twin.modules() if type(module) not in _CONTAINERS]
    for module in chain:
        module.register_forward_hook(hook_store_io)
    with torch.enable_grad():
        chosen = detached.outputs(twin)
        z = samples.lay_out(chosen)
    cotangents = make_cotangents(chosen.detach())
    extension = _RowsExtension()
    with torch.no_grad(), as_cast():
        extension.propagate(chain, cotangents_at(chain[-1].output, z, cotangents))
    layers = []
    for owner in owners:
        (use,), (x, g) = owner.uses, extension.kept[owner.module]
        if not (is_batch(owner.module, x) and samples.fit(x, g.shape[1], cotangents.shape[1])):
            raise UnsupportedModel(
                f"The model's output has {cotangents.shape[1]} entries along its first axis, and layer {owner.name!r} sees "
                f"{len(x)}: the first axis must be the sample. Keep the positions of a sample on an axis of their own, [N, C, T]."
            )
        layers.append(samples.form(use, (x,), g, cotangents.shape[1]))
    return SweepResult(chosen.detach(), cotangents, in_parameter_order(trainable(model), layers), GraphSignature())


def _twin(module: Any) -> Any:
    """Copy modules without an obstacle, which hold nothing that refers to another, in a sixth of `structural_twin`'s time."""
    twin = copy.copy(module)
    vars(twin).update({name: held.copy() for name, held in vars(module).items() if isinstance(held, dict)})
    for name, parameter in module._parameters.items():
        if parameter is not None:
            twin._parameters[name] = nn.Parameter(parameter.detach(), parameter.requires_grad)
    twin._modules.update({name: _twin(child) for name, child in module._modules.items() if child is not None})
    return twin
