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
    PickOutput,
    Seed,
    Swept,
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

Reading = tuple[Arguments, Samples]
"""The model's arguments, and what a sample is in them."""


def read(model: nn.Module, inputs: Any, nodes: NodeChoice) -> Reading:
    """Tell the arguments of a model, and what a sample is."""
    arguments = as_arguments(inputs)
    return arguments, samples_of(model.base if isinstance(model, Linearized) else model, inputs, arguments, nodes)


def sweep(
    model: nn.Module, reading: Reading, pick: PickOutput, engine: Engine, seed: Seed, *, single: bool = False
) -> Swept:
    """Run one engine, checked; a linearised model is swept at its origin and seeded at its own output.

    Args:
        model: the model.
        reading: its arguments.
        pick: which output.
        engine: which engine.
        seed: makes the rows at the output.
        single: whether that is one row an output vector, which "auto" leaves to autograd.
    """
    if not isinstance(model, Linearized):
        return _checked_sweep(model, reading, pick, _choose(model, pick, engine, single, model), seed, model)
    arguments, samples = reading
    with torch.no_grad(), left_as_found(model.base):
        z = samples.choose(call(model, arguments, pick))
    base = structural_twin(model.base, {name: p.requires_grad for name, p in model.named_parameters()})
    swept = _checked_sweep(base, reading, pick, _choose(base, pick, engine, single, model), lambda _: seed(z), model)
    return replace(swept, output=z)


def _checked_sweep(
    model: nn.Module, reading: Reading, pick: PickOutput, chosen: str, seed: Seed, once_for: nn.Module
) -> Swept:
    trainable(model)
    arguments, samples = reading

    def forward() -> Tensor:
        with left_as_found(model), unwatched(model), differentiable_recurrence(model), contiguous_gradients(model):
            return samples.lay_out(samples.choose(call(model, arguments, pick)))

    def attempt() -> tuple[Swept, tuple[str, ...]]:
        with left_as_found(model):
            if chosen == "backpack":
                swept = backpack.sweep(model, arguments, pick, seed, samples)
            else:
                swept = autograd.sweep(
                    model, arguments, pick, seed, samples, checks_of(once_for).routes, unfactored(once_for)
                )
        check_finite(swept)
        wrong = wrong_rows(model, forward, swept, chosen, once_for)
        return replace(swept, graph=None), wrong

    swept, wrong = attempt()
    if wrong and chosen == "autograd":
        with without_factors(once_for, wrong):
            swept, wrong = attempt()
            refuse(wrong)
    refuse(wrong)
    return swept


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
