"""Recurrent networks and their cells, decomposed into their linear maps and a loop over time.

Source: Martens, Ba & Johnson 2018 (K-FAC for recurrent networks; *expand* over time is their independent case).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from curvlab.errors import UnsupportedModel
from curvlab.rows.modules.composite import Composite, Project, Projection

Hidden = tuple[Tensor, ...]
"""h, and c of an LSTM."""

CellStep = Callable[[Tensor, Tensor, Hidden], Hidden]
"""`(W_ih x + b_ih, W_hh h + b_hh, state)` to the next state."""


def _lstm(own: Tensor, fed_back: Tensor, state: Hidden) -> Hidden:
    i, f, g, o = (own + fed_back).chunk(4, dim=-1)
    c = torch.sigmoid(f) * state[1] + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(c), c


def _gru(own: Tensor, fed_back: Tensor, state: Hidden) -> Hidden:
    (r, z, n), (r_h, z_h, n_h) = own.chunk(3, dim=-1), fed_back.chunk(3, dim=-1)
    update = torch.sigmoid(z + z_h)
    new = torch.tanh(n + torch.sigmoid(r + r_h) * n_h)
    return ((1 - update) * new + update * state[0],)


def _elman(activation: Callable[[Tensor], Tensor]) -> CellStep:
    return lambda own, fed_back, state: (activation(own + fed_back),)  # noqa: ARG005


_STEPS: Mapping[str, CellStep] = {
    "LSTM": _lstm,
    "GRU": _gru,
    "RNN_TANH": _elman(torch.tanh),
    "RNN_RELU": _elman(torch.relu),
}


def _suffixes(module: nn.RNNBase) -> list[list[str]]:
    directions = ["", "_reverse"] if module.bidirectional else [""]
    return [[f"_l{layer}{direction}" for direction in directions] for layer in range(module.num_layers)]


def _network_parts(module: nn.RNNBase) -> Mapping[str, Mapping[str, str]]:
    parts: dict[str, Mapping[str, str]] = {}
    for suffix in (suffix for layer in _suffixes(module) for suffix in layer):
        parts |= _cell_parts(module, suffix)
        if module.proj_size:
            parts[f"hr{suffix}"] = {"weight": f"weight_hr{suffix}"}
    return parts


def _cell_parts(module: nn.Module, suffix: str = "") -> dict[str, Mapping[str, str]]:
    locals_of = {"weight": "weight", "bias": "bias"} if module.bias else {"weight": "weight"}
    return {
        f"{part}{suffix}": {local: f"{kind}_{part}{suffix}" for local, kind in locals_of.items()}
        for part in ("ih", "hh")
    }


def _network(module: nn.RNNBase, project: Project, input: Any, hx: Any = None) -> tuple[Any, Any]:  # noqa: A002
    """Run as `nn.LSTM`, `nn.GRU` and `nn.RNN` do."""
    if isinstance(input, PackedSequence):
        x, lengths = pad_packed_sequence(input, batch_first=True)
        inside = torch.arange(x.shape[1], device=x.device) < lengths.to(x.device)[:, None]
        outputs, last = _layers(module, project, x, hx, inside)
        return _packed_like(input, outputs, lengths), last
    if input.ndim != 3:
        raise UnsupportedModel(
            f"{type(module).__name__} was called on an input without a sample axis. Call it on sequences [N, T, features]."
        )
    outputs, last = _layers(module, project, input if module.batch_first else input.transpose(0, 1), hx, None)
    return outputs if module.batch_first else outputs.transpose(0, 1), last


def _packed_like(given: PackedSequence, padded: Float[Tensor, "N T H"], lengths: Int[Tensor, " N"]) -> PackedSequence:
    """Pack sequences in the order of others."""
    order = given.sorted_indices
    if order is not None:
        padded, lengths = padded[order], lengths[order.to(lengths.device)]
    data = pack_padded_sequence(padded, lengths, batch_first=True).data
    return PackedSequence(data, given.batch_sizes, order, given.unsorted_indices)


def _layers(
    module: nn.RNNBase, project: Project, x: Float[Tensor, "N T I"], hx: Any, inside: Bool[Tensor, "N T"] | None
) -> tuple[Float[Tensor, "N T H"], Any]:
    """Return the last layer's outputs, and the last states of all; `inside` says which times a sequence has, all if None."""
    suffixes = _suffixes(module)
    ends: list[Hidden] = []
    for depth, layer in enumerate(suffixes):
        found = []
        for suffix in layer:
            first = _initial(module, x, hx, len(ends))
            outputs, end = _unrolled(_STEPS[module.mode], project, suffix, x, first, inside)
            found.append(outputs)
            ends.append(end)
        x = torch.cat(found, dim=-1)
        if depth < len(suffixes) - 1:
            x = F.dropout(x, module.dropout, module.training)
    last = tuple(torch.stack(states) for states in zip(*ends, strict=True))
    return x, last if len(last) > 1 else last[0]


def _initial(module: nn.RNNBase, x: Tensor, hx: Any, k: int) -> Hidden:
    """Return the first state of the k-th layer and direction."""
    if hx is not None:
        return tuple(state[k] for state in hx) if isinstance(hx, tuple) else (hx[k],)
    zeros = x.new_zeros(len(x), module.hidden_size)
    h = x.new_zeros(len(x), module.proj_size) if module.proj_size else zeros
    return (h, zeros) if module.mode == "LSTM" else (h,)


def _unrolled(
    step: CellStep,
    project: Project,
    suffix: str,
    x: Float[Tensor, "N T I"],
    state: Hidden,
    inside: Bool[Tensor, "N T"] | None,
) -> tuple[Float[Tensor, "N T H"], Hidden]:
    """Return h at every time, and the last state; in reverse for a reverse direction.

    Sequences keep their state at times that they do not have.
    """
    own, feed_back = project[f"ih{suffix}"](x), project[f"hh{suffix}"]
    times = range(x.shape[1])
    backwards = suffix.endswith("_reverse")
    states = []
    for t in reversed(times) if backwards else times:
        after = step(own[:, t], feed_back(state[0]), state)
        if f"hr{suffix}" in project:
            after = (project[f"hr{suffix}"](after[0]), *after[1:])
        if inside is not None:
            now = inside[:, t, None]
            after = tuple(torch.where(now, new, old) for new, old in zip(after, state, strict=True))
        state = after
        states.append(state[0])
    return torch.stack(states[:: -1 if backwards else 1], dim=1), state


def _cell(module: nn.RNNCellBase, project: Project, input: Tensor, hx: Any = None) -> Any:  # noqa: A002
    """Run as `nn.LSTMCell`, `nn.GRUCell` and `nn.RNNCell` do."""
    if input.ndim != 2:
        raise UnsupportedModel(
            f"{type(module).__name__} was called on an input without a sample axis. Call it on [N, features]."
        )
    mode = f"RNN_{module.nonlinearity.upper()}" if isinstance(module, nn.RNNCell) else type(module).__name__[:-4]
    zeros = input.new_zeros(len(input), module.hidden_size)
    state = (zeros, zeros) if hx is None else hx if isinstance(hx, tuple) else (hx,)
    maps: tuple[Projection, Projection] = (project["ih"], project["hh"])
    after = _STEPS[mode](maps[0](input), maps[1](state[0]), state)
    return after if len(after) > 1 else after[0]


RECURRENT = Composite(_network_parts, _network)
CELL = Composite(_cell_parts, _cell)
