"""Powers in training: directions against solves, and Adam as a structure with a power."""

from typing import Any

import pytest
import torch
from preconditioner_cases import data, network, run
from torch import nn

from curvlab.optim import LevenbergMarquardt, NaturalGradient, Preconditioner


@pytest.mark.parametrize("structure", ["kfac", "diagonal", "block-diagonal"])
@pytest.mark.parametrize(("power", "damps"), [(0.5, "matrix"), (0.25, "power")])
def test_the_direction_is_the_solve_of_the_power(structure: str, power: float, damps: Any) -> None:
    pre = Preconditioner(
        network(), nn.CrossEntropyLoss(), structure, kind="exact", damping=0.1, power=power, damps=damps, kl_clip=None
    )
    run(pre, *data())
    gradient = {name: p.grad.clone() for name, p in pre.model.named_parameters() if p.grad is not None}
    pre.precondition()
    expected = pre.structure.solve(gradient, 0.1, power=power, damps=damps)
    for name, p in pre.model.named_parameters():
        torch.testing.assert_close(p.grad, expected[name])  # type: ignore[index]


def test_adam_without_momentum_is_the_diagonal_of_batch_rows_to_the_power_one_half() -> None:
    """A running average that is divided by its weights has Adam's correction of the bias."""
    model, loss = network(), nn.CrossEntropyLoss()
    other = network()
    other.load_state_dict(model.state_dict())
    adam = torch.optim.Adam(other.parameters(), lr=0.01, betas=(0.0, 0.99), eps=1e-6)
    natural = NaturalGradient(
        model, loss, 0.01, structure="diagonal", kind="empirical", rows="batch", power=0.5, damps="power", damping=1e-6,
        decay=0.99, kl_clip=None,
    )  # fmt: skip
    for step in range(6):
        x, y = data(seed=step)
        adam.zero_grad()
        loss(other(x), y).backward()
        adam.step()
        natural.zero_grad()
        with natural.collect():
            loss(model(x), y).backward()
        natural.step()
    for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("options", [{"damping": LevenbergMarquardt()}, {"lr": "quadratic", "damping": 0.1}])
def test_what_is_about_the_quadratic_model_takes_the_first_power(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"are about the quadratic model of F \+ ρI: with power=0.5 give numbers"):
        NaturalGradient(network(), nn.CrossEntropyLoss(), power=0.5, **options)
    assert not NaturalGradient(network(), nn.CrossEntropyLoss(), power=0.5).adapts


@pytest.mark.usefixtures("unchecked_types")
def test_a_power_has_to_be_positive_and_damps_known() -> None:
    with pytest.raises(ValueError, match="power is a finite number > 0, got 0"):
        Preconditioner(network(), nn.CrossEntropyLoss(), power=0.0)
    with pytest.raises(ValueError, match="Did you mean 'matrix'"):
        Preconditioner(network(), nn.CrossEntropyLoss(), damps="matrx")  # type: ignore[arg-type]
