"""Any twice-differentiable loss of one output tensor, by automatic differentiation.

The loss says by its attribute `reduction` whether it is a mean or a sum. A copy with reduction="sum" has to add up over
samples, which is checked: samples are told apart by the binary digits of their indices, so that any two fall into different
halves of the batch for some digit. A mean's divisor is the ratio of the copy's gradient to the loss's own.

What is taken apart is what the user calls, forward hooks and a `forward` of the instance's own included; hooks on gradients are
no part of it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from curvlab.errors import UnsupportedModel
from curvlab.nn.hooks import unwatched
from curvlab.rows.loss.likelihood import Computed
from curvlab.rows.loss.table import reduction_of
from curvlab.rows.loss.terms import LossTerms

Value = Callable[[Tensor, Any], Tensor]
Called = TypeVar("Called", bound=Value)
Hook = TypeVar("Hook", bound=Callable[..., None])

NEARBY = 1e-2
"""How far outputs are moved where the gradient of a loss vanishes."""
FAR = (1.0, 100.0)
"""How far they are moved at random to tell a loss that vanishes everywhere from one that is flat where the outputs are."""

WRAP = (
    "Wrap a function that returns one value a sample: curvlab.nn.PerSample(function, reduction='mean'), called as "
    "function(outputs, targets)."
)


def own_terms(loss: nn.Module, z: Tensor, targets: Any) -> LossTerms:
    """Take any loss apart; its terms are samples, all positions of a sample together.

    Raises:
        UnsupportedModel: if the loss does not follow its attribute `reduction`, couples samples, or is linear in the
            outputs.
        ValueError: if the divisor of a mean cannot be told, or the Hessian is not finite.
        NotPositiveDefinite: see `Computed`, when rows are formed.

    Cost: `2 log₂ N` evaluations of the loss with gradients, and C·X more for a Hessian `[N, C·X, C·X]`.
    """
    reduction = reduction_of(loss)
    name, total = _name(loss), _as_sum(loss)
    slope = _gradient(total, z, targets)
    _check_additive(name, total, z, targets, slope)
    N, D = len(z), z[0].numel()

    def hessian() -> Float[Tensor, "N DD 1"]:
        H = _hessian(name, total, z, targets)
        if not bool(H.any()) and bool(slope.any()):
            raise UnsupportedModel(f"{name} is linear in the outputs, so it has no curvature and no rows.")
        return H.reshape(N, D * D, 1)

    return LossTerms(
        name=name,
        likelihood=Computed(hessian),
        z=z.reshape(N, D, 1),
        weight=z.new_ones(N, 1, 1),
        score=slope.reshape(N, D, 1),
        count=divisor(loss, z, targets) if reduction == "mean" else 1.0,
        reduction=reduction,
    )


def watching(hook: Hook) -> Hook:
    """Mark a hook on a loss that only looks on, so that it is no part of the loss."""
    hook.watches = True  # type: ignore[attr-defined]
    return hook


def is_altered(loss: nn.Module) -> bool:
    """Whether a module has hooks, or a `forward` of its own, so that it may be another loss than its class."""
    called = as_called(loss)
    return "forward" in vars(called) or bool(called._forward_pre_hooks or called._forward_hooks)


def as_called(loss: Called) -> Called:
    """Return a copy without the hooks that only look on."""
    called = copy.copy(loss)
    for name in ("_forward_pre_hooks", "_forward_hooks"):
        hooks = getattr(loss, name, None)
        if hooks is not None:
            setattr(called, name, type(hooks)((k, hook) for k, hook in hooks.items() if not hasattr(hook, "watches")))
    return called


def has_gradient(loss: nn.Module, z: Tensor, targets: Any, terms: Callable[[Tensor], LossTerms]) -> bool:
    """Whether a loss has the gradient of given terms, at the outputs and nearby; not known where both vanish."""
    ramp = torch.linspace(0, NEARBY, z.numel(), dtype=z.dtype, device=z.device).view_as(z)
    vanish = True
    for at in (z, z * (1 - ramp)):
        found = _gradient(as_called(loss), at, targets)
        expected = terms(at)
        if expected.count == 0:
            return False
        gradient = (expected.weight * expected.score / expected.count).view_as(z)
        if not float((found - gradient).norm()) <= torch.finfo(z.dtype).eps ** 0.5 * float(gradient.norm()):
            return False
        vanish = vanish and not bool(gradient.any())
    return not vanish


def _name(loss: Value) -> str:
    name = type(loss).__name__ + (" with its hooks" if isinstance(loss, nn.Module) and is_altered(loss) else "")
    return f"{name}({inner})" if isinstance(inner := getattr(loss, "name", None), str) else name


def _as_sum(loss: Value) -> Value:
    """Return the sum over samples that a loss is the mean of, or the loss."""
    summed = as_called(loss)
    try:
        if summed is loss:
            raise AttributeError("A function is not copied.")
        summed.reduction = "sum"  # type: ignore[attr-defined]
    except AttributeError as error:
        raise UnsupportedModel(f"The attribute reduction of {type(loss).__name__} cannot be set. {WRAP}") from error
    return summed


def _gradient(value: Value, z: Tensor, targets: Any) -> Tensor:
    with torch.enable_grad(), unwatched(value):
        at = z.detach().requires_grad_()
        (found,) = torch.autograd.grad(value(at, targets), at, allow_unused=True, materialize_grads=True)
    return found


def _hessian(name: str, value: Value, z: Tensor, targets: Any) -> Float[Tensor, "N D D"]:
    """Return the Hessian of every sample, by products with one output of all samples at a time."""
    with torch.enable_grad(), unwatched(value):
        at = z.detach().requires_grad_()
        (slope,) = torch.autograd.grad(value(at, targets), at, create_graph=True, materialize_grads=True)
        flat = slope.reshape(len(z), -1)
        if not flat.requires_grad:
            return flat.new_zeros(*flat.shape, flat.shape[1])
        columns = [
            torch.autograd.grad(column.sum(), at, retain_graph=True, materialize_grads=True)[0] for column in flat.T
        ]
    H = torch.stack(columns, dim=1).reshape(*flat.shape, -1)
    broken = (~H.isfinite()).flatten(1).any(1)
    if bool(broken.any()):
        raise ValueError(
            f"The Hessian of {name} is not finite, first at sample {int(broken.nonzero()[0])}: a function there has no "
            "second derivative or overflows."
        )
    return (H + H.mT) / 2


def _check_additive(name: str, total: Value, z: Tensor, targets: Any, slope: Tensor) -> None:
    N = len(z)
    tolerance = torch.finfo(z.dtype).eps ** 0.5 * float(slope.norm())
    for part in _halves(N, z.device):
        try:
            alone = _gradient(total, z[part], _of(targets, part, N))
        except (RuntimeError, ValueError, IndexError) as error:
            raise bound_to_samples(total, N, error) from error
        if not float((alone - slope[part]).norm()) <= tolerance:
            raise UnsupportedModel(
                f"{name} is not a sum over samples: the gradient at some samples changes when others leave the batch, or "
                f"its attribute reduction='sum' has no effect. Rows a sample do not exist for samples that a loss couples. {WRAP}"
            )


def bound_to_samples(loss: Value, count: int, error: Exception) -> UnsupportedModel:
    """Return the error for a loss that cannot be called on some of a number of samples."""
    held = held_by_sample(loss, count)
    what = f"holds {', '.join(held)} with one entry a sample" if held else "may hold tensors with one entry a sample"
    return UnsupportedModel(
        f"{_name(loss)} {what}, and cannot be called on some of the samples ({str(error).strip().splitlines()[0]}). Hand them "
        "over with the targets: curvlab.nn.PerSample(function), called as function(outputs, (targets, weights))."
    )


def held_by_sample(loss: Value, count: int) -> list[str]:
    """Return the names of tensors that a module holds with one entry for each of a number of samples."""
    if not isinstance(loss, nn.Module):
        return []
    tensors = {**vars(loss), **dict(loss.named_buffers()), **dict(loss.named_parameters())}
    return [name for name, x in tensors.items() if isinstance(x, Tensor) and x.shape[:1] == (count,)]


def _halves(N: int, device: torch.device) -> Iterator[Int[Tensor, " M"]]:
    """Yield both halves of a batch for every binary digit of the indices; for one sample, that sample twice."""
    index = torch.arange(N, device=device)
    if N == 1:
        yield index.repeat(2)
    for digit in range((N - 1).bit_length()):
        bit = (index >> digit) & 1
        yield index[bit == 0]
        yield index[bit == 1]


def _of(targets: Any, part: Int[Tensor, " M"], N: int) -> Any:
    """Take the targets of some samples: of every tensor whose first axis is the sample."""
    return tree_map_only(Tensor, lambda y: y[part.to(y.device)] if y.ndim and len(y) == N else y, targets)


def divisor(loss: Value, z: Tensor, targets: Any) -> float:
    """Return the ratio of sum to mean, which is the same at all outputs: where all gradients vanish, it is told elsewhere.

    It is 0 where the sum vanishes everywhere, as where all targets are ignored: the mean is then 0/0, or 0 if its divisor is
    kept from being 0.

    Raises:
        UnsupportedModel, ValueError: see `own_terms`.
    """
    total, generator = _as_sum(loss), torch.Generator().manual_seed(0)
    moves = [torch.randn(z.shape, generator=generator, dtype=z.dtype, device="cpu").to(z.device) for _ in FAR]
    vanishes = True
    for at in (z, z + NEARBY, *(z + far * move for far, move in zip(FAR, moves, strict=True))):
        both, mean = _gradient(total, at, targets), _gradient(as_called(loss), at, targets)
        if bool(mean.any()):
            ratio = float((both * both).sum() / (both * mean).sum())
            distance = float((both - ratio * mean).norm())
            if 0 < ratio < float("inf") and distance <= torch.finfo(z.dtype).eps ** 0.5 * float(both.norm()):
                return ratio
        vanishes = vanishes and not (bool(both.any()) or bool(total(at, targets)))
    if vanishes:
        return 0.0
    raise ValueError(
        f"The divisor of {_name(loss)} on a batch cannot be told from its sum and its mean. Use reduction='sum', or: {WRAP}"
    )
