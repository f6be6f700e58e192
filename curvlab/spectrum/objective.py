"""The loss of a model on a data set as a function of some of its parameters, batch by batch.

Batches merge as the loss has it: a mean over all data is `Σ terms·(mean of a batch) / Σ terms`, `terms` being the
divisor that the loss applied to the batch, and sums add. `Objective.total` does that for whatever is linear in the loss.
A batch whose divisor is 0, such as one whose targets are all ignored, has no mean and no part in the merged one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves

from curvlab.errors import UnsupportedModel
from curvlab.nn import WeightedCrossEntropy
from curvlab.nn.functional import called_with
from curvlab.nn.hooks import unwatched
from curvlab.nn.modes import randomness
from curvlab.rows.batches import Data, as_batches, as_pair, shuffles
from curvlab.rows.loss import LOSSES, divisor, loss_terms
from curvlab.rows.loss.own import is_altered
from curvlab.rows.modules.lookup import check_table
from curvlab.rows.owners import trainable
from curvlab.rows.parameters import ParameterSpace
from curvlab.rows.processes import Processes
from curvlab.rows.sharded import whole
from curvlab.rows.sweep import Arguments, PickOutput, as_arguments, left_as_found, select_output
from curvlab.spectrum.selection import choose

Loss = nn.Module | Callable[[Tensor, Any], Tensor]
Parameters = dict[str, Tensor]

CLASS_LOSSES = (nn.CrossEntropyLoss, nn.NLLLoss, WeightedCrossEntropy)
"""Losses whose targets may be classes."""


def _mean_square(loss: Any, z: Tensor, targets: Tensor) -> Tensor:
    found: Tensor = F.mse_loss(z, targets, reduction="none").mean() if loss.reduction == "mean" else loss(z, targets)
    return found


def _huber(loss: Any, z: Tensor, targets: Tensor) -> Tensor:
    scaled: Tensor = loss.delta * F.smooth_l1_loss(z, targets, reduction=loss.reduction, beta=loss.delta)
    return scaled


FORWARD: Mapping[type, Callable[[Any, Tensor, Any], Tensor]] = {nn.MSELoss: _mean_square, nn.HuberLoss: _huber}
"""Losses whose gradient has no forward derivative in torch, by functions whose gradient has one."""


@dataclass(frozen=True)
class Part:
    """A batch: the model's output and the loss as functions of the parameters."""

    model: nn.Module
    loss: Loss
    arguments: Arguments
    targets: Any
    pick: PickOutput

    def output(self, parameters: Parameters) -> Float[Tensor, "N C ..."]:
        """Call the model with these parameters in place of its own; what it does to its buffers is lost."""
        args, kwargs = self.arguments
        constants = {name: parameter.detach() for name, parameter in self.model.named_parameters()}
        buffers = {name: buffer.clone() for name, buffer in self.model.named_buffers()}
        state = {**constants, **buffers, **parameters}
        return select_output(called_with(self.model, state, args, kwargs), self.pick)

    def of_output(self, z: Float[Tensor, "N C ..."]) -> Float[Tensor, ""]:
        """Return the loss of an output."""
        with unwatched(self.loss):
            known = FORWARD.get(type(self.loss))
            if known is not None and isinstance(self.loss, nn.Module) and not is_altered(self.loss):
                return known(self.loss, z, self.targets)
            value: Tensor = self.loss(z, self.targets)
        return value

    def checked(self, z: Float[Tensor, "N C ..."]) -> Float[Tensor, ""]:
        """Return the loss of an output; where it cannot be called on it, and is known, say what does not fit."""
        try:
            return self.of_output(z)
        except (IndexError, RuntimeError, TypeError, ValueError):
            if isinstance(self.loss, nn.Module) and type(self.loss) in LOSSES:
                loss_terms(self.loss, z.detach(), self.targets)
            raise

    def value(self, parameters: Parameters) -> Float[Tensor, ""]:
        """Return the loss."""
        return self.of_output(self.output(parameters))


class Objective:
    """Model, loss and data.

    Args:
        model: any module; frozen parameters are constants. It is left as it was found.
        loss: called as `loss(outputs, targets)`, with a scalar result.
        data: see `Data`.
        parameters: names of parameters, or of modules for all parameters below them; all trainable ones if None.
        output: which tensor of a structured output to use, as in `curvlab.jacobian`.
        group: processes that have a part of the data each; None for this one with all.

    Raises:
        UnsupportedModel: if there is no trainable parameter, gradients of an embedding are not its derivative, or two passes
            over the data disagree.
        ValueError: for data that are empty or can be passed once only, a loss that is no scalar or not finite, unknown
            parameters, and several batches under a loss that does not tell how they merge.

    Cost: two gradients, which must agree.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Loss,
        data: Data,
        parameters: str | Sequence[str] | None = None,
        output: PickOutput = None,
        group: ProcessGroup | None = None,
    ) -> None:
        self.given, self.loss, self.pick, self.processes = model, loss, output, Processes.of(group)
        self.batches = repeatable(data)
        self._whole: nn.Module | None = None
        own = trainable(self.model)
        for name, module in self.model.named_modules():
            if isinstance(module, nn.Embedding | nn.EmbeddingBag):
                check_table(module, name)
        self.names = choose(own, parameters)
        if not self.names:
            raise ValueError("parameters=[] leaves nothing to differentiate by; leave it out for all of them.")
        self.space = ParameterSpace({name: own[name].shape for name in self.names})
        first = own[self.names[0]]
        self.dtype, self.device = first.dtype, first.device
        self.outputs = 0
        """Numbers that the model returns for the largest batch."""
        self._check()

    @property
    def model(self) -> nn.Module:
        """The model; a sharded one with its parameters as they are now, gathered once a pass over the data."""
        return whole(self.given) if self._whole is None else self._whole

    @property
    def parameters(self) -> Parameters:
        """The chosen parameters as they are now, detached."""
        own = dict(self.model.named_parameters())
        return {name: own[name].detach() for name in self.names}

    def total(self, share: Callable[[Part], Tensor], *shape: int) -> Tensor:
        """Merge over all batches what `share` makes of each: a new tensor, linear in the loss.

        Args:
            share: returns a tensor of a batch.
            shape: that of the tensor.

        Raises:
            ValueError: if there is no batch, or none whose mean has a term.
        """
        self._whole = self.model
        try:
            with left_as_found(self._whole), nullcontext() if self.processes is None else self.processes.together():
                merged, weight, skipped = self._merged(share)
        finally:
            self._whole = None
        if self.processes is not None:
            if merged is None:
                merged = torch.zeros(shape, dtype=self.dtype, device=self.device)
            merged = self.processes.total(merged)
            weight = float(self.processes.total(torch.tensor(weight, dtype=torch.float64, device=self.device)))
        if weight == 0 or merged is None:
            raise ValueError(
                f"{_name(self.loss)} is a mean over no terms in any of the {skipped} batches: all targets are ignored or of "
                "weight 0. Check the targets, ignore_index and the weights of the loss."
            )
        return merged if self._adds else merged.div_(weight)

    def _merged(self, share: Callable[[Part], Tensor]) -> tuple[Tensor | None, float, int]:
        """Return what batches add up to, their weight, and how many have none."""
        merged: Tensor | None = None
        weights, skipped, adds = 0.0, 0, self._adds
        for batch in self.batches:
            part = self._part(batch)
            weight = 1.0 if adds else self._terms(part)
            if weight == 0:
                skipped += 1
                continue
            own = share(part) if adds else share(part).mul_(weight)
            merged = own if merged is None else merged.add_(own)
            weights += weight
        if not (weights or skipped):
            raise ValueError("The data hold no batch: they are empty, or can be passed once only.")
        return merged, weights, skipped

    def gradient(self) -> tuple[Float[Tensor, ""], Float[Tensor, " P"]]:
        """Return the loss and its gradient."""
        both = self.total(self._value_and_gradient, 1 + self.space.size)
        return both[0], both[1:]

    def moved(self, direction: Float[Tensor, " P"], step: float) -> tuple[Float[Tensor, ""], Float[Tensor, " P"]]:
        """Return the loss and its gradient at parameters that have moved along a direction."""
        here, move = self.parameters, self.space.unflatten(step * direction)
        at = {name: value + move[name] for name, value in here.items()}
        both = self.total(lambda part: self._value_and_gradient(part, at), 1 + self.space.size)
        return both[0], both[1:]

    def check_fisher(self) -> None:
        """Refuse a loss whose Hessian at the outputs is not known to be a Fisher matrix.

        Raises:
            UnsupportedModel: for such a loss.
        """
        if not isinstance(self.loss, nn.Module):
            raise UnsupportedModel(
                f"The Hessian of {_name(self.loss)} is not known to be a Fisher matrix. Use kind='ggn'."
            )
        with torch.no_grad(), left_as_found(self.model):
            part = self._part(next(iter(self.batches)))
            loss_terms(self.loss, part.output({}), part.targets).check("exact", part=not self.single)

    @property
    def single(self) -> bool:
        """Whether the data are one batch."""
        return self.processes is None and hasattr(self.batches, "__len__") and len(self.batches) == 1

    @property
    def _adds(self) -> bool:
        """Whether batches add up with weight 1."""
        reduction = getattr(self.loss, "reduction", None)
        if not self.single and reduction not in ("mean", "sum"):
            raise ValueError(
                f"{_name(self.loss)} does not say how several batches merge. Give it an attribute reduction='mean' or "
                "'sum', as the losses of torch.nn have it, or pass all data as one batch."
            )
        return self.single or reduction == "sum"

    def _part(self, batch: Any) -> Part:
        inputs, targets = as_pair(batch)
        if isinstance(self.loss, CLASS_LOSSES) and isinstance(targets, Tensor) and targets.dtype == torch.uint8:
            targets = targets.long()  # vmap does not take them, although the losses do
        return Part(self.model, self.loss, as_arguments(inputs), targets, self.pick)

    def _terms(self, part: Part) -> float:
        """Return the divisor of the mean over a batch: known for known losses, else from gradients of sum and mean."""
        with torch.no_grad():
            z = part.output({})
            if not len(z):
                raise ValueError("The inputs hold zero samples.")
            if isinstance(self.loss, nn.Module) and type(self.loss) in LOSSES:
                return loss_terms(self.loss, z, part.targets).terms
            return divisor(self.loss, z, part.targets)

    def _value_and_gradient(self, part: Part, at: Parameters | None = None) -> Float[Tensor, " Q"]:
        """Return the loss, followed by its gradient, at the parameters as they are or at others."""
        own = {name: value.detach().requires_grad_() for name, value in (at or self.parameters).items()}
        with torch.enable_grad():
            z = part.output(own)
            if not len(z):
                raise ValueError("The inputs hold zero samples.")
            self.outputs = max(self.outputs, z.numel())
            value = part.checked(z)
            if not isinstance(value, Tensor) or value.ndim:
                raise ValueError(f"{_name(self.loss)} returns no scalar; use reduction='mean' or 'sum'.")
            if not bool(value.isfinite()):
                broken = (~z.isfinite()).flatten(1).any(1).nonzero()
                where = f": the model's output is not, first at sample {int(broken[0])}" if len(broken) else ""
                if not where and not all(
                    bool(t.isfinite().all()) for t in tree_leaves(part.targets) if isinstance(t, Tensor)
                ):
                    where = ": the targets are not"
                raise ValueError(f"The loss is not finite{where}. Check inputs, targets and parameters.")
            zero = sum(p.flatten()[:0].sum() for p in own.values())
            gradient = torch.autograd.grad(value + zero, list(own.values()), materialize_grads=True)
        return torch.cat([value.detach().reshape(1).to(self.dtype), *(g.flatten() for g in gradient)])

    def _check(self) -> None:
        first, second = (self.total(self._value_and_gradient, 1 + self.space.size) for _ in range(2))
        if not bool(first.isfinite().all()):
            bad = [name for name, g in self.space.unflatten(first[1:]).items() if not bool(g.isfinite().all())]
            raise ValueError(
                f"The gradient of {', '.join(bad)} is not finite, although the loss is: a function there has no "
                "derivative or overflows."
            )
        difference = float((first - second).norm())
        if not difference <= torch.finfo(self.dtype).eps ** 0.5 * float(first.norm()):
            raise UnsupportedModel(
                f"Loss and gradient differ by {difference:.2g} between two passes over the data, so there is no one "
                f"operator. {self._suspects()}"
            )

    def _suspects(self) -> str:
        """Say what makes two passes differ, and the remedy."""
        noisy = [
            f"{type(module).__name__} {name!r}" for name, module in self.model.named_modules() if randomness(module)
        ]
        shuffled = shuffles(self.batches)
        found = [f"{', '.join(noisy)} in training mode: call model.eval() first."] if noisy else []
        found += ["The loader shuffles: use shuffle=False."] if shuffled else []
        return " ".join(found or ["Model, loss or data are random, or keep a state: make them deterministic."])


def repeatable(data: Data) -> Any:
    """Return the batches of data: a list of one pair, or what can be passed over and over.

    Raises:
        ValueError: for an iterator, which can be passed once only.
    """
    if isinstance(data, Iterator):
        raise ValueError(
            f"The data are a {type(data).__name__}, which can be passed once only; every product needs a pass. Use a "
            "DataLoader, or list(…)."
        )
    return as_batches(data)


def _name(loss: Loss) -> str:
    return type(loss).__name__ if isinstance(loss, nn.Module) else getattr(loss, "__name__", "The loss")
