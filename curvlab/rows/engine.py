"""Sweeps of a model by one of two engines, its rows checked against a product with the Jacobian."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import get_args
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from curvlab.errors import UnsupportedModel, unknown_name
from curvlab.nn import Linearized
from curvlab.nn.hooks import unwatched
from curvlab.rows import autograd, backpack
from curvlab.rows.guard import checks_of, refuse, unfactored, without_factors, wrong_rows
from curvlab.rows.owners import contiguous_gradients, trainable
from curvlab.rows.passes import Engine, ModelInputs, Pass
from curvlab.rows.sweep import (
    MakeCotangents,
    SweepResult,
    check_finite,
    differentiable_recurrence,
    left_as_found,
    structural_twin,
)

logger = logging.getLogger("curvlab")

_announced: WeakKeyDictionary[nn.Module, set[str]] = WeakKeyDictionary()


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
                checks = checks_of(once_for)
                sweep_result = autograd.sweep(
                    model, inputs, make_cotangents, checks.signatures, checks.shared, unfactored(once_for)
                )
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
