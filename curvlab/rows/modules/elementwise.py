"""Layers whose parameters act elementwise: normalisations with a scale and a shift, and PReLU's slopes."""

from __future__ import annotations

from typing import Any

from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from curvlab.rows.layer import LayerRows
from curvlab.rows.modules.rule import Inputs, LayerUse, Rule, scale_shift


def _batch_norm(use: LayerUse, inputs: Inputs, g: Tensor) -> LayerRows:
    module: Any = use.module
    mean, variance = (None, None) if module.training else (module.running_mean, module.running_var)
    plain = F.batch_norm(inputs[0], mean, variance, training=module.training, eps=module.eps)
    return _per_channel(use, plain, g)


def _instance_norm(use: LayerUse, inputs: Inputs, g: Tensor) -> LayerRows:
    module: Any = use.module
    own = module.training or not module.track_running_stats
    mean, variance = (None, None) if own else (module.running_mean, module.running_var)
    plain = F.instance_norm(inputs[0], mean, variance, use_input_stats=own, eps=module.eps)
    return _per_channel(use, plain, g)


def _group_norm(use: LayerUse, inputs: Inputs, g: Tensor) -> LayerRows:
    module: Any = use.module
    return _per_channel(use, F.group_norm(inputs[0], module.num_groups, eps=module.eps), g)


def _layer_norm(use: LayerUse, inputs: Inputs, g: Tensor) -> LayerRows:
    module: Any = use.module
    return _per_feature(use, F.layer_norm(inputs[0], module.normalized_shape, eps=module.eps), g)


def _rms_norm(use: LayerUse, inputs: Inputs, g: Tensor) -> LayerRows:
    module: Any = use.module
    return _per_feature(use, F.rms_norm(inputs[0], module.normalized_shape, eps=module.eps), g)


def _prelu(use: LayerUse, inputs: Inputs, g: Tensor) -> LayerRows:
    """Return the rows of slopes, which scale the negative part of the input."""
    negative = inputs[0].clamp_max(0)
    if use.layout.units > 1:
        return _per_channel(use, negative, g)
    V, N = g.shape[:2]
    return scale_shift(use, negative.reshape(N, -1, 1), g.reshape(V, N, -1, 1))


def _per_channel(use: LayerUse, plain: Float[Tensor, "N U ..."], g: Float[Tensor, "V N U ..."]) -> LayerRows:
    V, N, U = g.shape[:3]
    return scale_shift(use, plain.reshape(N, U, -1).transpose(1, 2), g.reshape(V, N, U, -1).transpose(2, 3))


def _per_feature(use: LayerUse, plain: Float[Tensor, "N ..."], g: Float[Tensor, "V N ..."]) -> LayerRows:
    (V, N), U = g.shape[:2], use.layout.units
    return scale_shift(use, plain.reshape(N, -1, U), g.reshape(V, N, -1, U))


BATCH_NORM = Rule(lambda m: m.num_features, _batch_norm)
INSTANCE_NORM = Rule(lambda m: m.num_features, _instance_norm, axes=lambda m: m._get_no_batch_dim() + 1)
GROUP_NORM = Rule(lambda m: m.num_channels, _group_norm)
LAYER_NORM = Rule(lambda m: m.weight.numel(), _layer_norm)
RMS_NORM = Rule(lambda m: m.weight.numel(), _rms_norm)
PRELU = Rule(lambda m: m.num_parameters, _prelu)
