"""Sweeps of a model by one of two engines, its rows checked against a product with the Jacobian."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any, Literal, get_args
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from curvlab.errors import UnsupportedModel, unknown_name
from curvlab.nn import Linearized
from curvlab.nn.hooks import unwatched
from curvlab.rows import autograd, backpack
from curvlab.rows.guard import checks_of, refuse, unfactored, without_factors, wrong_rows
from curvlab.rows.owners import contiguous_gradients, trainable
from curvlab.rows.samples import NodeChoice, Samples, samples_of
from curvlab.rows.sweep import (
    Arguments,
    MakeCotangents,
    PickOutput,
    SweepResult,
    as_arguments,
    call,
    check_finite,
    differentiable_recurrence,
    left_as_found,
    structural_twin,
)

logger = logging.getLogger("curvlab")

Engine = Literal["auto", "backpack", "autograd"]
_announced: WeakKeyDictionary[nn.Module, set[str]] = WeakKeyDictionary()

ModelInputs = tuple[Arguments, Samples]
"""The model's arguments, and what a sample is in them."""


def read(model: nn.Module, inputs: Any, nodes: NodeChoice) -> ModelInputs:
    """Tell the arguments of a model, and what a sample is."""
    arguments = as_arguments(inputs)
    return arguments, samples_of(model.base if isinstance(model, Linearized) else model, inputs, arguments, nodes)


def sweep(
    model: nn.Module,
    read_inputs: ModelInputs,
    pick: PickOutput,
    engine: Engine,
    make_cotangents: MakeCotangents,
    *,
    single: bool = False,
) -> SweepResult:
    """Run one engine, checked; a linearised model is swept at its origin, with the cotangents of its own output.

    Args:
        model: the model.
        read_inputs: its arguments, and what a sample is in them.
        pick: which output.
        engine: which engine.
        make_cotangents: makes the rows at the output.
        single: whether that is one row an output vector, which "auto" leaves to autograd.
    """
    if not isinstance(model, Linearized):
        return _checked_sweep(
            model, read_inputs, pick, _choose(model, pick, engine, single, model), make_cotangents, model
        )
    arguments, samples = read_inputs
    with torch.no_grad(), left_as_found(model.base):
        z = samples.choose(call(model, arguments, pick))
    base = structural_twin(model.base, {name: p.requires_grad for name, p in model.named_parameters()})
    sweep_result = _checked_sweep(
        base, read_inputs, pick, _choose(base, pick, engine, single, model), lambda _: make_cotangents(z), model
    )
    return replace(sweep_result, output=z)


def _checked_sweep(
    model: nn.Module,
    read_inputs: ModelInputs,
    pick: PickOutput,
    chosen: str,
    make_cotangents: MakeCotangents,
    once_for: nn.Module,
) -> SweepResult:
    trainable(model)
    arguments, samples = read_inputs

    def forward() -> Tensor:
        with left_as_found(model), unwatched(model), differentiable_recurrence(model), contiguous_gradients(model):
            return samples.lay_out(samples.choose(call(model, arguments, pick)))

    def attempt() -> tuple[SweepResult, tuple[str, ...]]:
        with left_as_found(model):
            if chosen == "backpack":
                sweep_result = backpack.sweep(model, arguments, pick, make_cotangents, samples)
            else:
                sweep_result = autograd.sweep(
                    model,
                    arguments,
                    pick,
                    make_cotangents,
                    samples,
                    checks_of(once_for).signatures,
                    unfactored(once_for),
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


def _choose(model: nn.Module, pick: PickOutput, engine: Engine, single: bool, announced_for: nn.Module) -> str:
    if engine not in get_args(Engine):
        raise unknown_name("engine", engine, get_args(Engine))
    if engine == "autograd":
        return engine
    if engine == "auto" and single:
        reason: str | None = "one row a sample takes one plain backward pass"
    else:
        reason = backpack.obstacle(model, pick)
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
