"""Models of the transformers library, built from small configurations: keyword inputs and structured outputs."""

from typing import Any

import pytest
import torch
from oracle import DOUBLE
from torch import Tensor, nn
from transformer_cases import (
    FAMILIES,
    ROWS,
    SAMPLES,
    SINGLE,
    check_fit,
    check_rows,
    decoder,
    gradients,
    per_token,
    picked,
    step_of,
)

from curvlab import compare
from curvlab.fisher import Full, make
from curvlab.rows import jacobian, sqrt_fisher
from curvlab.rows.factored import KroneckerRows
from curvlab.testing.oracle import assert_close, trainable

FACTORED = {
    "gpt2": ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"],
    "vit": ["q_proj", "fc1", "classifier"],
}


@pytest.mark.parametrize("family", FACTORED)
def test_rows_and_what_they_leave_behind(transformers: Any, family: str) -> None:
    torch.manual_seed(0)
    model, inputs, pick, _ = FAMILIES[family](transformers)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    rows = jacobian(model, inputs, output=pick)
    assert_close(rows.dense(), gradients(model, picked(model(**inputs), pick)))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert not any(module._forward_hooks or "forward" in vars(module) for module in model.modules())
    factored = [layer.name for layer in rows.layers if isinstance(layer, KroneckerRows)]
    assert all(any(layer.endswith(part) for layer in factored) for part in FACTORED[family])


def test_a_language_model_end_to_end(transformers: Any) -> None:
    """Rows of the loss on shifted tokens, where the padding is ignored; the Fisher matrix has their trace."""
    torch.manual_seed(1)
    model, inputs, _, _ = FAMILIES["gpt2"](transformers)
    labels = torch.where(inputs["attention_mask"] == 1, inputs["input_ids"], -100)[:, 1:]

    def shifted(found: Any) -> Tensor:
        return found.logits[:, :-1].mT

    rows = sqrt_fisher(model, nn.CrossEntropyLoss(), inputs, labels, "empirical", output=shifted)
    values = nn.CrossEntropyLoss(reduction="none")(shifted(model(**inputs)), labels)
    squares = float(gradients(model, values[labels >= 0][:, None]).square().sum())
    structure = make("kfac").update(rows)
    assert abs(float(make("diagonal").update(rows).trace()) * rows.count - squares) < 1e-9 * squares
    assert structure.space.size == sum(p.numel() for p in trainable(model).values())
    step = structure.solve(torch.ones(structure.space.size, dtype=DOUBLE), 0.1)
    assert bool(step.isfinite().all())


@pytest.mark.parametrize(
    ("family", "tolerance"), [("gpt2", 1e-9), ("bert-masked", 1e-9), ("llama", SINGLE), ("mixtral", SINGLE)]
)
@pytest.mark.parametrize("kind", ["exact", "empirical"])
def test_a_padded_batch_is_its_sequences_and_these_are_their_tokens(
    transformers: Any, family: str, tolerance: float, kind: Any
) -> None:
    """Padding is masked and ignored; batches of different lengths have the matrix and the count of their tokens."""
    torch.manual_seed(2)
    model, x, pick, y = FAMILIES[family](transformers)
    lengths = x["attention_mask"].sum(1).tolist()
    apart = [({"input_ids": x["input_ids"][n : n + 1, :T]}, y[n : n + 1, :T]) for n, T in enumerate(lengths)]
    options: Any = {"kind": kind, "output": pick, "side": "parameters"}
    whole, parts = (Full.fit(model, nn.CrossEntropyLoss(), data, **options) for data in ((x, y), apart))
    assert whole.count == parts.count == int((y >= 0).sum())
    assert_close(parts.to_dense(), whole.to_dense(), tolerance)
    if kind == "empirical":
        g = torch.cat([per_token(model, *sequence) for sequence in apart])
        assert_close(whole.to_dense(), g.T @ g / len(g), tolerance)


@pytest.mark.parametrize("family", ["Llama", "Mistral", "Qwen2", "Gemma"])
def test_models_that_compute_in_float32_inside(transformers: Any, family: str) -> None:
    """Their round-off in float64 is no sign of samples that interact."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 11, "hidden_size": 8, "intermediate_size": 12, "head_dim": 4}
    model = decoder(transformers, family, **sizes)
    inputs = {"input_ids": torch.randint(1, 11, (SAMPLES, 4))}
    rows = jacobian(model, inputs, output=lambda found: found.logits[:, -1])
    assert_close(rows.dense(), gradients(model, model(**inputs).logits[:, -1]), SINGLE)


def t5(library: Any, T: int, U: int, *, tied: bool) -> tuple[nn.Module, dict[str, Tensor]]:
    """An encoder and a decoder, with normalisations of the library's own and biases by distance that all samples share."""
    torch.manual_seed(0)
    config = library.T5Config(
        vocab_size=7,
        d_model=4,
        d_kv=2,
        d_ff=6,
        num_layers=1,
        num_heads=2,
        relative_attention_num_buckets=4,
        relative_attention_max_distance=6,
        decoder_start_token_id=0,
        tie_word_embeddings=tied,
    )
    mask = torch.ones(SAMPLES, T, dtype=torch.long)
    mask[1, -1] = 0
    inputs = {"input_ids": torch.randint(1, 7, (SAMPLES, T)), "attention_mask": mask}
    inputs["decoder_input_ids"] = torch.randint(1, 7, (SAMPLES, U))
    return library.T5ForConditionalGeneration(config).to(DOUBLE).eval(), inputs


@pytest.mark.parametrize(("T", "U", "tied"), [(4, 2, True), (3, 3, False)])
def test_t5(transformers: Any, T: int, U: int, tied: bool) -> None:
    """Also where a table of positions has as many rows as there are samples. The normalisations compute in float32."""
    model, inputs = t5(transformers, T, U, tied=tied)
    loss, y, damping = nn.CrossEntropyLoss(), torch.tensor([1, 4, 6]), 0.1

    def pick(found: Any) -> Tensor:
        return found.logits[:, -1]

    J = gradients(model, pick(model(**inputs)))
    assert_close(jacobian(model, inputs, output=pick).dense(), J)
    p = pick(model(**inputs)).detach().softmax(1)
    H = torch.diag_embed(p) - p[:, :, None] * p[:, None]
    F = torch.einsum("cnp,ncd,dnq->pq", J.view(7, SAMPLES, -1), H, J.view(7, SAMPLES, -1)) / SAMPLES
    rows = sqrt_fisher(model, loss, inputs, y, output=pick)
    assert_close(rows.dense().T @ rows.dense(), F)
    values = nn.CrossEntropyLoss(reduction="none")(pick(model(**inputs)), y)[:, None]
    S = gradients(model, values) / SAMPLES**0.5
    assert_close(sqrt_fisher(model, loss, inputs, y, "empirical", output=pick).dense(), S, 1e-5)
    table = compare(model, loss, (inputs, y), ["full", "kfac"], damping=[damping], output=pick, steps=0).table
    assert table["cosine"][0] == pytest.approx(1, abs=1e-6)
    for key in ("kfac", "full"):
        gradient, step = step_of(
            model, lambda model, loss: loss(pick(model(**inputs)), y), structure=key, damping=damping
        )
        assert_close(step, make(key).update(rows).solve(gradient, damping), 1e-9)
        if key == "full":
            assert_close(step, torch.linalg.solve(F + damping * torch.eye(len(F), dtype=DOUBLE), gradient), 1e-9)


@pytest.mark.parametrize(
    ("family", "rows"),
    [
        ("gpt2", "mc"),
        ("embedded", "exact"),
        ("llama", "mc-term"),
        ("llama-tied", "signs"),
        ("packed", "empirical"),
        ("mixtral", "mc"),
        ("bert-masked", "sample"),
        ("bert-classes", "mc"),
        ("vit", "empirical"),
    ],
)
def test_some_rows_of_every_family(transformers: Any, family: str, rows: str, caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(5)
    check_rows(FAMILIES[family](transformers), ROWS[rows])
    assert "single samples" not in caplog.text


@pytest.mark.study
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("family", FAMILIES)
def test_all_rows_of_every_family(transformers: Any, family: str, rows: str) -> None:
    for seed in range(3):
        torch.manual_seed(seed)
        check_rows(FAMILIES[family](transformers), ROWS[rows])


@pytest.mark.parametrize(
    ("family", "key", "rows"),
    [
        ("gpt2", "kfac", "mc"),
        ("llama", "ekfac", "empirical"),
        ("vit", "component-wise", "mc"),
        ("mixtral", "diagonal", "mc"),
        ("mixtral", "kfac", "empirical"),
        ("mixtral", "ekfac", "empirical"),
        ("mixtral", "full", "empirical"),
    ],
)
def test_some_fits(transformers: Any, family: str, key: str, rows: str) -> None:
    torch.manual_seed(6)
    check_fit(FAMILIES[family](transformers), key, ROWS[rows])


@pytest.mark.study
@pytest.mark.parametrize("rows", ["exact", "mc", "empirical", "sample"])
@pytest.mark.parametrize("key", ["full", "block-diagonal", "kfac", "ekfac", "diagonal", "component-wise"])
@pytest.mark.parametrize("family", FAMILIES)
def test_all_fits(transformers: Any, family: str, key: str, rows: str) -> None:
    torch.manual_seed(7)
    check_fit(FAMILIES[family](transformers), key, ROWS[rows])
