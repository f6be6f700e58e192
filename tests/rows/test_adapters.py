"""Adapters of the peft library on a frozen base: LoRA and its kin."""

import warnings
from typing import Any

import pytest
import torch
from oracle import DOUBLE
from torch import nn
from transformer_cases import FAMILIES, ROWS, check_fit, check_rows

from curvlab.optim import NaturalGradient
from curvlab.rows import jacobian
from curvlab.rows.factored import KroneckerRows


@pytest.fixture(scope="module")
def peft(transformers: Any) -> Any:
    return pytest.importorskip("peft", reason="peft is not installed")


def adapted(peft: Any, model: nn.Module, *targets: str, **more: Any) -> nn.Module:
    """Put adapters on a model, B away from zero."""
    torch.manual_seed(14)
    config = peft.LoraConfig(r=2, lora_alpha=4, target_modules=list(targets), **more)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(model, config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data = 0.3 * torch.randn_like(parameter)
    return model.to(DOUBLE).eval()


@pytest.mark.parametrize("rows", ["exact", "mc", "empirical"])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_lora_has_factored_rows_on_a_frozen_base(
    transformers: Any, peft: Any, family: str, rows: str, caplog: pytest.LogCaptureFixture
) -> None:
    targets = {"gpt2": ("c_attn", "c_proj"), "llama": ("q_proj", "v_proj")}[family]
    model, x, pick, y = FAMILIES[family](transformers)
    model = adapted(peft, model, *targets, fan_in_fan_out=family == "gpt2")
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trained
    assert all("lora_" in name for name in trained)
    found = jacobian(model, x, output=pick)
    assert all(isinstance(layer, KroneckerRows) for layer in found.layers)
    assert len(found.layers) == len(trained)
    check_rows((model, x, pick, y), ROWS[rows])
    check_fit((model, x, pick, y), "kfac", ROWS[rows])
    assert "for every batch" not in caplog.text


def test_natural_gradient_trains_adapters_alone(transformers: Any, peft: Any) -> None:
    model, x, pick, _ = FAMILIES["llama"](transformers)
    y = torch.where(x["attention_mask"] == 1, x["input_ids"].roll(-1, 1), -100)
    model, loss = adapted(peft, model, "q_proj", "v_proj", lora_dropout=0.1).train(), nn.CrossEntropyLoss()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimiser = NaturalGradient(model, loss, lr=0.3, structure="kfac", kind="mc", damping=1e-2, kl_clip=1e-2)
    losses = []
    for _ in range(12):
        optimiser.zero_grad()
        with optimiser.collect():
            value = loss(pick(model(**x)), y)
            value.backward()
        optimiser.step()
        losses.append(float(value.detach()))
    assert losses[-1] < losses[0] - 0.05
    for name, p in model.named_parameters():
        assert torch.equal(before[name], p) != ("lora_" in name)


@pytest.mark.parametrize(
    ("targets", "more"),
    [
        (["q_proj"], {"use_dora": True}),
        (["q_proj"], {"modules_to_save": ["lm_head"]}),
        (["q_proj", "embed_tokens"], {}),
    ],
    ids=["weights made of adapters", "a layer trained beside them", "of an embedding"],
)
def test_other_adapters_have_exact_rows(transformers: Any, peft: Any, targets: list[str], more: dict[str, Any]) -> None:
    model, x, pick, y = FAMILIES["llama"](transformers)
    model = adapted(peft, model, *targets, **more)
    check_rows((model, x, pick, y), ROWS["exact"])
    check_rows((model, x, pick, y), ROWS["empirical"])
