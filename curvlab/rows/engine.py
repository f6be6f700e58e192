"""Sweeps of a model by one of two engines, its rows checked against a product with the Jacobian."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from typing import get_args
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from curvlab.errors import UnsupportedModel, unknown_name
from curvlab.nn import Linearized
from curvlab.nn.hooks import unwatched
from curvlab.nn.modes import eagerly
from curvlab.rows import autograd, backpack
from curvlab.rows.autograd import Forward, prepared
from curvlab.rows.guard import Comparison, checks_of, refuse, unfactored, without_factors, wrong_rows
from curvlab.rows.layer import LayerRows
from curvlab.rows.owners import contiguous_gradients, trainable
from curvlab.rows.passes import Engine, ModelInputs, Pass
from curvlab.rows.sweep import (
    MakeCotangents,
    SweepResult,
    check_all_finite,
    check_finite,
    check_rows_finite,
    differentiable_recurrence,
    left_as_found,
    structural_twin,
)

logger = logging.getLogger("curvlab")

Open = Callable[[Tensor], Callable[[LayerRows], None]]
"""Is given a model's output, and returns what takes the rows of one layer after the other."""

_announced: WeakKeyDictionary[nn.Module, set[str]] = WeakKeyDictionary()


@eagerly()
def checked_sweep(model: nn.Module, inputs: ModelInputs, make_cotangents: MakeCotangents, how: Pass) -> SweepResult:
    """Run one engine, checked; a linearised model is swept at its origin, with the cotangents of its own output.

    One row an output vector is left to autograd by "auto".
    """
    if not isinstance(model, Linearized):
        return _sweep(model, inputs, make_cotangents, _choose(model, how, model), model)
    with torch.no_grad(), left_as_found(model.base):
        z = inputs.outputs(model)
    base = structural_twin(model.base, {name: p.requires_grad for name, p in model.named_parameters()})
    return replace(_sweep(base, inputs, lambda _: make_cotangents(z), _choose(base, how, model), model), output=z)


def _sweep(
    model: nn.Module, inputs: ModelInputs, make_cotangents: MakeCotangents, chosen: str, once_for: nn.Module
) -> SweepResult:
    trainable(model)

    def forward() -> Tensor:
        with left_as_found(model), unwatched(model), differentiable_recurrence(model), contiguous_gradients(model):
            return inputs.samples.lay_out(inputs.outputs(model))

    def attempt() -> tuple[SweepResult, tuple[str, ...]]:
        with left_as_found(model):
            if chosen == "backpack":
                sweep_result = backpack.sweep(model, inputs, make_cotangents)
            else:
                known = checks_of(once_for).known
                sweep_result = autograd.sweep(model, inputs, make_cotangents, known, unfactored(once_for))
        check_finite(sweep_result)
        wrong = wrong_rows(model, forward, sweep_result, chosen, once_for)
        return replace(sweep_result, graph=None), wrong

    sweep_result, wrong = attempt()
    if wrong and chosen == "autograd":
        with without_factors(once_for, wrong):
            sweep_result, wrong = attempt()
            refuse(wrong)
    refuse(wrong)
    return sweep_result


@eagerly()
def checked_stream(
    model: nn.Module,
    inputs: ModelInputs,
    make_cotangents: MakeCotangents,
    how: Pass,
    open_: Open,
    *,
    anew: bool = False,
    whole: bool = False,
) -> None:
    """Run one engine, checked, and hand on the rows of one layer after the other.

    Of a sweep by autograd, each is forgotten before the next one is formed. Rows that are too many at once are brought back some
    after the others; those of a layer then come in as many parts, of the same samples. Where rows have to be compared first, those
    of the first part are, in a reverse pass of its own, unless what takes them can be opened anew.

    Args:
        model: any module.
        inputs: what it is called on.
        make_cotangents: chooses the rows at its outputs.
        how: which rows.
        open_: is given the model's output, and returns what takes the rows of a layer.
        anew: whether another call of `open_` makes up for rows that were wrong.
        whole: whether the rows of a layer have to come in one part.
    """
    start = None if how.generator is None else how.generator.get_state()
    if not isinstance(model, Linearized) and _choose(model, how, model) == "autograd":
        if _stream(model, inputs, make_cotangents, open_, anew=anew, whole=whole):
            return
        if how.generator is not None and start is not None:
            how.generator.set_state(start)
    found = checked_sweep(model, inputs, make_cotangents, how)
    take = open_(found.output)
    for layer in found.layers:
        take(layer)


def _stream(
    model: nn.Module, inputs: ModelInputs, make_cotangents: MakeCotangents, open_: Open, *, anew: bool, whole: bool
) -> bool:
    """Whether the rows of layers could be handed on as a reverse pass reached them, and were right."""
    trainable(model)
    known, without = checks_of(model).known, unfactored(model)
    with left_as_found(model), prepared(model, inputs, make_cotangents, known, without) as forward:
        if not forward.streams:
            return False
        first, *others = [slice(None)] if whole else forward.groups()
        check = _Check(model, forward, first)
        if check.new and not (forward.repeated or _repeats(model, inputs, forward.chosen)):
            return False
        if check.due and not anew:
            forward.stream(first, check.take, keep=True)
            if not check.passes():
                return False
            check.due = False
        for call in forward.calls:
            check_all_finite(call.use.name, call.inputs)
        take = open_(forward.chosen.detach())

        def take_finite(layer: LayerRows) -> None:
            check_rows_finite(layer)
            if check.due:
                check.take(layer)
            take(layer)

        forward.stream(first, take_finite, keep=check.due or bool(others))
        if check.due and not check.passes():
            return False
        check.due = False
        for position, rows in enumerate(others, 1):
            forward.stream(rows, take_finite, keep=position < len(others))
        return True


def _repeats(model: nn.Module, inputs: ModelInputs, outputs: Tensor) -> bool:
    """Whether another forward pass returns the same, as it does not with noise of the model's own."""
    with torch.no_grad(), unwatched(model):
        again = inputs.outputs(model)
    return torch.allclose(again, outputs, rtol=torch.finfo(outputs.dtype).eps ** 0.5)


class _Check:
    """The comparison of some rows of a pass, if it is due.

    Attributes:
        new: whether a pass of this kind has not been right yet, in every parameter.
        due: whether the comparison is to be done.
    """

    def __init__(self, model: nn.Module, forward: Forward, rows: slice) -> None:
        self._checks, self._signature, parameters = checks_of(model), forward.signature, trainable(model)
        shapes = tuple(call.inputs[0].shape for call in forward.calls)
        common = (forward.cotangents.shape, forward.z.dtype, tuple(parameters), model.training)
        self._kind = ("stream", *common, self._signature.functions, shapes)
        self.new = self._checks.new(self._kind, self._signature, parameters)
        self.due = self._checks.due(self._kind, self._signature, parameters)
        self._comparison = Comparison(parameters, forward.z, forward.cotangents[rows])
        self.take = self._comparison.take

    def passes(self) -> bool:
        """Whether the rows were right."""
        wrong, verified = self._comparison.result()
        if not wrong:
            self._checks.add(self._kind, self._signature, verified)
        return not wrong


def _choose(model: nn.Module, how: Pass, announced_for: nn.Module) -> str:
    engine = how.engine
    if engine not in get_args(Engine):
        raise unknown_name("engine", engine, get_args(Engine))
    if engine == "autograd":
        return engine
    if engine == "auto" and how.single:
        reason: str | None = "one row a sample takes one plain backward pass"
    else:
        reason = backpack.obstacle(model, how.output)
    if engine == "backpack":
        if reason is not None:
            raise UnsupportedModel(f"The BackPACK engine does not apply: {reason}. Use engine='autograd'.")
        return engine
    chosen = "autograd" if reason else "backpack"
    announced = _announced.setdefault(announced_for, set())
    if chosen not in announced:
        announced.add(chosen)
        if reason is None:
            logger.info("Rows by the BackPACK engine: the model is a chain of modules that it knows.")
        else:
            logger.info("Rows by the autograd engine: %s.", reason)
    return chosen
