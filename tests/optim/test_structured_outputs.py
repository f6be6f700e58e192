"""Models with several heads and batches by name train as the fit of a structure and the flat model say."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from optimiser_cases import flat
from oracle import DOUBLE
from torch import Tensor, nn

from curvlab.errors import UnsupportedModel
from curvlab.fisher import KFAC
from curvlab.nn import MultiTask
from curvlab.nn.tasks import Task
from curvlab.optim import LevenbergMarquardt, NaturalGradient, Preconditioner

RHO = 1e-2


@dataclass
class Both:
    """What a model with two heads returns."""

    classes: Tensor
    values: Tensor


class Heads(nn.Module):
    """Two heads on one body; its features come by position or by name."""

    def __init__(self, form: Callable[[Tensor, Tensor], Any]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.form = form
        self.body, self.classes, self.values = nn.Linear(4, 6), nn.Linear(6, 3), nn.Linear(6, 2)
        self.double()

    def forward(self, features: Tensor, shift: float = 0.0) -> Any:
        hidden = torch.tanh(self.body(features) + shift)
        return self.form(self.classes(hidden), self.values(hidden))


def joined(classes: Tensor, values: Tensor) -> Tensor:
    return torch.cat([classes, values], 1)


FORMS: dict[str, tuple[Callable[..., Any], Any]] = {
    "one tensor": (joined, None),
    "tuple": (lambda *heads: heads, lambda heads: joined(*heads)),
    "dict": (lambda c, v: {"classes": c, "values": v}, lambda heads: joined(heads["classes"], heads["values"])),
    "dataclass": (Both, lambda heads: joined(heads.classes, heads.values)),
}
"""How a model returns its heads, and how they are joined."""

tasks = MultiTask(
    {
        "classes": Task(nn.CrossEntropyLoss(reduction="sum"), slice(0, 3)),
        "numbers": Task(nn.MSELoss(reduction="sum"), slice(3, 5), 0.5),
    }
)


def data(N: int = 8) -> tuple[Tensor, dict[str, Any]]:
    """Features, and targets by task, of which the second lacks some."""
    made = torch.Generator().manual_seed(1)
    values = torch.randn(N, 2, dtype=DOUBLE, generator=made)
    mask = torch.arange(N) % 3 > 0
    features = torch.randn(N, 4, dtype=DOUBLE, generator=made)
    return features, {"classes": torch.randint(3, (N,), generator=made), "numbers": (values, mask)}


def joins(pick: Any) -> Callable[[Any], Tensor]:
    return pick or (lambda output: output)


@pytest.mark.parametrize("kind", ["exact", "mc", "empirical"])
@pytest.mark.parametrize("form", FORMS)
def test_the_direction_is_that_of_a_fit_to_the_same_batch(form: str, kind: Any) -> None:
    (make, pick), (x, y) = FORMS[form], data()
    model = Heads(make)
    natural = Preconditioner(
        model,
        tasks,
        "kfac",
        kind=kind,
        rows="term" if kind == "empirical" else None,
        damping=RHO,
        output=pick,
        kl_clip=None,
    )
    with natural.collect():
        tasks(joins(pick)(model(x)), y).backward()
    gradient = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    natural.precondition()
    generator = torch.Generator().manual_seed(0)
    fitted = KFAC.fit(model, tasks, (x, y), kind=kind, generator=generator, output=pick)
    wanted: Any = fitted.solve(gradient, RHO)
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, wanted[name], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("form", [form for form in FORMS if form != "one tensor"])
def test_the_quadratic_model_takes_the_same_steps_whatever_form_the_outputs_have(form: str) -> None:
    steps = []
    for make, pick in (FORMS["one tensor"], FORMS[form]):
        model, (x, y) = Heads(make), data()
        made = NaturalGradient(
            model, tasks, "quadratic", kind="exact", damping=LevenbergMarquardt(every=1), output=pick, kl_clip=None
        )
        values = []
        for _ in range(4):
            made.zero_grad()
            with made.collect():
                value = tasks(joins(pick)(model(x)), y)
                value.backward()
            made.step()
            values.append(float(value.detach()))
        steps.append(values)
    torch.testing.assert_close(steps[0], steps[1], rtol=1e-9, atol=0)
    assert steps[0][-1] < steps[0][0]


@pytest.mark.parametrize("output", [None, 1])
def test_one_head_of_several_is_picked_by_position_and_another_one_is_refused(output: int | None) -> None:
    model, (x, y), loss = Heads(FORMS["tuple"][0]), data(), nn.CrossEntropyLoss()

    def after_a_pass(output: int | None) -> NaturalGradient:
        made = NaturalGradient(model, loss, "quadratic", kind="exact", plain="values", output=output, kl_clip=None)
        with made.collect():
            loss(model(x)[0], y["classes"]).backward()
        return made

    after_a_pass(0).step()
    made = after_a_pass(output)
    with pytest.raises(UnsupportedModel, match="something else than what the model returned.*output="):
        made.step()


class Decoder(nn.Module):
    """Logits of a language model among other things."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table, self.head = nn.Embedding(7, 4).double(), nn.Linear(4, 7).double()

    def forward(self, tokens: Tensor) -> dict[str, Any]:
        return {"logits": self.head(torch.tanh(self.table(tokens))), "cache": None}


def test_logits_picked_by_key_may_be_flattened_for_the_loss() -> None:
    tokens, loss, found = torch.arange(12).view(3, 4) % 7, nn.CrossEntropyLoss(), []

    def flattened(made: dict[str, Any]) -> Tensor:
        logits: Tensor = made["logits"]
        return logits.flatten(0, 1)

    for output in ("logits", flattened):
        model = Decoder()
        optimizer = NaturalGradient(model, loss, "quadratic", kind="exact", output=output, kl_clip=None)
        with optimizer.collect():
            loss(flattened(model(tokens)), tokens.roll(1).flatten()).backward()
        optimizer.step()
        found.append(flat(model))
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-12)


def test_a_batch_by_name_takes_the_step_of_one_by_position() -> None:
    (make, pick), (x, y) = FORMS["dict"], data()
    found = []
    for call in (lambda model: model(x, 0.3), lambda model: model(shift=0.3, features=x)):
        model = Heads(make)
        made = NaturalGradient(model, tasks, "quadratic", kind="exact", output=pick, kl_clip=None)
        with made.collect():
            tasks(pick(call(model)), y).backward()
        made.step()
        found.append(flat(model))
    assert torch.equal(*found)


@pytest.mark.usefixtures("unchecked_types")
def test_a_loss_on_all_heads_at_once_says_to_join_them() -> None:
    class OnHeads(nn.Module):
        reduction = "mean"

        def forward(self, heads: Any, targets: Any) -> Tensor:
            return nn.functional.cross_entropy(heads["classes"], targets["classes"])

    model, (x, y), loss = Heads(FORMS["dict"][0]), data(), OnHeads()
    natural = Preconditioner(model, loss, kl_clip=None)
    with pytest.raises(UnsupportedModel, match=r"called on a dict.*torch.cat\(heads, 1\)"), natural.collect():
        loss(model(x), y).backward()
