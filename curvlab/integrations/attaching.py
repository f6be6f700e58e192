"""A preconditioner as part of an optimiser, so that whatever steps, saves and restores the optimiser does so with both."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

import torch

from curvlab.optim import NaturalGradient, Preconditioner

OptimizerT = TypeVar("OptimizerT", bound=torch.optim.Optimizer)


def attach(preconditioner: Preconditioner, optimizer: OptimizerT) -> OptimizerT:
    """Make every step of an optimiser one of preconditioned gradients, for loops that are not the user's.

        optimizer = attach(Preconditioner(model, loss), torch.optim.AdamW(model.parameters()))
        with optimizer.preconditioner.collect():
            loss(model(x), y).backward()
        optimizer.step()  # preconditions, then steps

    `step(closure)` opens the context itself. What has been done to gradients before the step, such as clipping, has been done to
    plain gradients. The optimiser's state dict holds the preconditioner's state, too. Hooks of `torch.optim` do all this; copies
    and pickles of the optimiser are without them.

    Args:
        preconditioner: the preconditioner.
        optimizer: of parameters of the same model.

    Returns:
        The optimiser, which has an attribute `preconditioner` now.

    Raises:
        ValueError: if it preconditions already, or steps none of the parameters.
    """
    if preconditioner_of(optimizer) is not None:
        raise ValueError(
            f"{type(optimizer).__name__} has a preconditioner already: attach one to an optimiser without."
        )
    stepped = {id(p) for group in optimizer.param_groups for p in group["params"]}
    if stepped.isdisjoint(map(id, preconditioner.parameters.values())):
        raise ValueError(
            f"{type(optimizer).__name__} has no parameter of the {type(preconditioner.model).__name__} that the preconditioner "
            "was made for: make both for the same model."
        )

    def precondition(
        _: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        given = kwargs.get("closure", args[1] if len(args) > 1 else None)
        if given is None:
            preconditioner.precondition(getattr(optimizer, "grad_scale", None))
            return None

        def closure() -> Any:
            value = preconditioner.run(given)
            preconditioner.precondition(getattr(optimizer, "grad_scale", None))
            return value

        return args[:1], {**kwargs, "closure": closure}

    def save(_: Any, state: dict[str, Any]) -> dict[str, Any]:
        return state | {"preconditioner": preconditioner.state_dict()}

    def load(_: Any, state: dict[str, Any]) -> None:
        if "preconditioner" not in state:
            raise ValueError(
                f"The state has no 'preconditioner', so it is that of a {type(optimizer).__name__} without one. Load what the "
                "optimiser's state_dict() returned after attach()."
            )
        preconditioner.load_state_dict(state["preconditioner"])

    optimizer.register_step_pre_hook(precondition)
    optimizer.register_state_dict_post_hook(save)
    optimizer.register_load_state_dict_pre_hook(load)
    optimizer.preconditioner = preconditioner  # type: ignore[attr-defined]
    return optimizer


def preconditioner_of(optimizer: torch.optim.Optimizer) -> Preconditioner | None:
    """Return the preconditioner of a `NaturalGradient` or of an optimiser that one is attached to."""
    return getattr(optimizer, "preconditioner", None)


def numbers_of(optimizer: torch.optim.Optimizer) -> Mapping[str, float]:
    """Return what is to be logged of a step, by name."""
    if isinstance(optimizer, NaturalGradient):
        return optimizer.log()
    found = preconditioner_of(optimizer)
    return {} if found is None else {"damping": found.damping.at(found.steps), "skipped": float(found.skipped)}
