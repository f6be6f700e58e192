"""How models of the transformers library are trained: their own losses, accumulation, checkpointing, bfloat16."""

import copy
import warnings
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformer_cases import FAMILIES, SINGLE, decoder, gpt2, gradients, last_axis_second, masked_tokens, step_of

from curvlab.errors import StateError, UnsupportedModel
from curvlab.fisher import KFAC, make
from curvlab.rows import jacobian, sqrt_fisher
from curvlab.testing.oracle import assert_close


def test_labels_that_the_model_shifts_itself(transformers: Any) -> None:
    """The loss on shifted logits, flattened or not, and the model's own loss once it calls the one that is given."""
    torch.manual_seed(9)
    x, _ = masked_tokens()
    labels = torch.where(x["attention_mask"] == 1, x["input_ids"], -100)

    def with_classes_second(model: nn.Module, loss: nn.Module) -> Tensor:
        return loss(model(**x).logits[:, :-1].mT, labels[:, 1:])

    def flattened(model: nn.Module, loss: nn.Module) -> Tensor:
        return loss(model(**x).logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())

    def inside(model: nn.Module, loss: nn.Module) -> Tensor:
        def shifted(logits: Tensor, labels: Tensor, **_: Any) -> Tensor:
            return loss(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())

        model.loss_function = shifted
        return model(**x, labels=labels).loss

    def unknown(model: nn.Module, _: nn.Module) -> Tensor:
        return model(**x, labels=labels).loss

    model = gpt2(transformers)
    expected, *found = (step_of(copy.deepcopy(model), way)[1] for way in (with_classes_second, flattened, inside))
    for step in found:
        assert_close(step, expected)
    with pytest.raises(StateError, match=r"labels among its inputs.*sequence_models.md"):
        step_of(model, unknown)


@pytest.mark.parametrize("key", ["kfac", "full"])
def test_gradients_that_accumulate_over_batches_of_different_lengths(transformers: Any, key: str) -> None:
    """Losses are added up with the shares of their tokens; curvature is that of all tokens."""
    torch.manual_seed(10)
    model = decoder(transformers, "Llama")
    parts = [({"input_ids": torch.randint(1, 5, (n, T))}, torch.randint(5, (n, T))) for n, T in ((2, 3), (1, 5))]
    total = sum(y.numel() for _, y in parts)

    def share(x: dict[str, Tensor], y: Tensor, model: nn.Module, loss: nn.Module) -> Tensor:
        return loss(model(**x).logits.flatten(0, 1), y.flatten()) * y.numel() / total

    options: Any = {} if key == "kfac" else {"side": "parameters"}
    passes = [partial(share, *part) for part in parts]
    gradient, step = step_of(model, *passes, structure=make(key, **options), decay=0.0)
    fit = type(make(key)).fit(model, nn.CrossEntropyLoss(), parts, output=last_axis_second, **options)
    assert_close(step, fit.solve(gradient, 0.1), SINGLE)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("kind", ["exact", "mc", "empirical"])
def test_gradient_checkpointing(transformers: Any, family: str, kind: Any) -> None:
    """Rows are those without it, in a sweep and in a pass of the user's, with dropout there, too."""
    torch.manual_seed(11)
    model, x, pick, y = FAMILIES[family](transformers)

    def rows() -> Tensor:
        drawn = {"generator": torch.Generator().manual_seed(0)} if kind == "mc" else {}
        return sqrt_fisher(model, nn.CrossEntropyLoss(), x, y, kind, output=pick, **drawn).dense()

    def noisy(model: nn.Module, loss: nn.Module) -> Tensor:
        torch.manual_seed(12)
        return loss(pick(model(**x)), y)

    expected = rows()
    step = step_of(model.train(), noisy, kind=kind)[1]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.gradient_checkpointing_enable({"use_reentrant": False})
        assert_close(step_of(model, noisy, kind=kind)[1], step, SINGLE)
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        assert_close(rows(), expected, SINGLE)
        model.gradient_checkpointing_enable({"use_reentrant": True})
        with pytest.raises(UnsupportedModel, match=r"use_reentrant=True.*use_reentrant=False"):
            rows()


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("family", ["gpt2", "llama", "mixtral"])
@pytest.mark.parametrize("cast", ["weights", "autocast"])
def test_half_precision(transformers: Any, family: str, cast: str) -> None:
    """Rows have the round-off of torch's own gradients in bfloat16, and factors, which add up in float32, four times that.

    A and B are quadratic in what has it, so that each has twice as much, and so has their product.
    """
    torch.manual_seed(13)
    model, x, pick, y = FAMILIES[family](transformers)
    loss, model = nn.CrossEntropyLoss(), model.float()
    options: Any = {"kind": "exact", "output": pick}

    def jacobian_of(model: nn.Module) -> Tensor:
        return gradients(model, pick(model(**x))).float()

    expected, J = KFAC.fit(model, loss, (x, y), **options), jacobian_of(model)
    half = copy.deepcopy(model).bfloat16() if cast == "weights" else model
    with torch.autocast("cpu", torch.bfloat16, enabled=cast == "autocast"):
        roundoff = relative(jacobian_of(half), J)
        rows = jacobian(half, x, output=pick, dtype=torch.float32)
        found = KFAC.fit(half, loss, (x, y), **options)
    assert roundoff > 2**-10
    assert relative(rows.dense(), J) < 1.5 * roundoff
    assert found.dtype == torch.float32
    assert relative(found.to_dense(), expected.to_dense()) < 4 * roundoff

    def autocast(model: nn.Module, loss: nn.Module) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=cast == "autocast"):
            z = pick(model(**x))
        return loss(z.float(), y)

    gradient, step = step_of(half, autocast)
    assert step.dtype == (torch.bfloat16 if cast == "weights" else torch.float32)
    assert relative(step.float(), found.solve(gradient.float(), 0.1)) < 4 * roundoff
