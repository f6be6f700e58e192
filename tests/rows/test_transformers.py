"""Models of the transformers library, built from small configurations: keyword inputs and structured outputs."""

import copy
import sys
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from oracle import DOUBLE
from torch import Tensor, nn

from curvlab import compare
from curvlab.errors import StateError, UnsupportedModel
from curvlab.fisher import KFAC, Full, make
from curvlab.optim import NaturalGradient, Preconditioner
from curvlab.rows import jacobian, sqrt_fisher
from curvlab.rows.factored import KroneckerRows
from curvlab.testing.oracle import assert_close, trainable

SAMPLES = 3


@pytest.fixture(scope="module")
def transformers() -> Any:
    """Import the library without torchvision, which does not import beside every build of torch."""
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        patch.setitem(sys.modules, "torchvision", None)
        found = pytest.importorskip("transformers", reason="transformers is not installed")
        # Another library may have asked before.
        found.utils.is_torchvision_available.cache_clear()
        assert found.GPT2LMHeadModel
        assert found.ViTForImageClassification
    return found


def gpt2(library: Any) -> tuple[nn.Module, dict[str, Tensor]]:
    config = library.GPT2Config(
        vocab_size=7, n_positions=5, n_embd=4, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0
    )
    lengths = torch.tensor([5, 3, 4])
    mask = (torch.arange(5) < lengths[:, None]).long()
    return library.GPT2LMHeadModel(config), {"input_ids": torch.randint(7, (SAMPLES, 5)), "attention_mask": mask}


def vit(library: Any) -> tuple[nn.Module, dict[str, Tensor]]:
    config = library.ViTConfig(
        hidden_size=4,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=6,
        image_size=4,
        patch_size=2,
        num_channels=2,
        num_labels=3,
    )
    return library.ViTForImageClassification(config), {"pixel_values": torch.randn(SAMPLES, 2, 4, 4, dtype=DOUBLE)}


def last_axis_second(found: Any) -> Tensor:
    return found.logits.mT


CASES = {"gpt2": (gpt2, last_axis_second), "vit": (vit, "logits")}


def gradients(model: nn.Module, z: Tensor) -> Tensor:
    """Return J in row order `(c, x, n)`, by one reverse pass a row."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    rows = z.flatten(1).T.flatten()
    found = [torch.autograd.grad(row, parameters, retain_graph=True, materialize_grads=True) for row in rows]
    return torch.stack([torch.cat([g.flatten() for g in row]) for row in found])


@pytest.mark.parametrize("name", CASES)
def test_rows_and_what_they_leave_behind(transformers: Any, name: str) -> None:
    torch.manual_seed(0)
    build: Callable[[Any], tuple[nn.Module, dict[str, Tensor]]] = CASES[name][0]
    model, inputs = build(transformers)
    model = model.double().eval()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    rows = jacobian(model, inputs, output=CASES[name][1])
    z = model(**inputs).logits
    z = z.mT if name == "gpt2" else z
    assert_close(rows.dense(), gradients(model, z))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert not any(module._forward_hooks or "forward" in vars(module) for module in model.modules())
    factored = [layer.name for layer in rows.layers if isinstance(layer, KroneckerRows)]
    expected = {
        "gpt2": ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"],
        "vit": ["q_proj", "fc1", "classifier"],
    }
    assert all(any(layer.endswith(part) for layer in factored) for part in expected[name])


def test_a_language_model_end_to_end(transformers: Any) -> None:
    """Rows of the loss on shifted tokens, where the padding is ignored; the Fisher matrix has their trace."""
    torch.manual_seed(1)
    model, inputs = gpt2(transformers)
    model = model.double().eval()
    labels = torch.where(inputs["attention_mask"] == 1, inputs["input_ids"], -100)[:, 1:]
    loss = nn.CrossEntropyLoss()

    def shifted(found: Any) -> Tensor:
        return found.logits[:, :-1].mT

    rows = sqrt_fisher(model, loss, inputs, labels, "empirical", output=shifted)
    z = shifted(model(**inputs))
    values = nn.CrossEntropyLoss(reduction="none")(z, labels)
    parameters = [p for p in model.parameters() if p.requires_grad]
    squares = sum(
        sum(float(g.square().sum()) for g in torch.autograd.grad(value, parameters, retain_graph=True))
        for value in values[labels >= 0]
    )
    structure = make("kfac").update(rows)
    assert abs(float(make("diagonal").update(rows).trace()) * rows.count - squares) < 1e-9 * squares
    assert structure.space.size == sum(p.numel() for p in trainable(model).values())
    step = structure.solve(torch.ones(structure.space.size, dtype=DOUBLE), 0.1)
    assert bool(step.isfinite().all())


def test_a_padded_batch_is_its_sequences_and_these_are_their_tokens(transformers: Any) -> None:
    """Padding is masked and ignored; batches of different lengths have the count of their tokens."""
    torch.manual_seed(2)
    model, inputs = gpt2(transformers)
    model, mask, tokens = model.double().eval(), inputs["attention_mask"], inputs["input_ids"]
    shifted = torch.where(mask[:, 1:] == 1, tokens[:, 1:], -100)
    labels = torch.cat([shifted, torch.full((SAMPLES, 1), -100)], dim=1)
    loss, lengths = nn.CrossEntropyLoss(), mask.sum(1).tolist()
    apart = [({"input_ids": tokens[n : n + 1, :T]}, labels[n : n + 1, :T]) for n, T in enumerate(lengths)]
    parameters = [p for p in model.parameters() if p.requires_grad]
    F, count = torch.zeros((), dtype=DOUBLE), 0
    for x, y in apart:
        z = model(**x).logits.mT
        for value in nn.CrossEntropyLoss(reduction="none")(z, y)[y >= 0]:
            found = torch.autograd.grad(value, parameters, retain_graph=True, materialize_grads=True)
            g = torch.cat([part.flatten() for part in found])
            F, count = F + torch.outer(g, g), count + 1
    options: Any = {"kind": "empirical", "output": last_axis_second, "side": "parameters"}
    for data in ((inputs, labels), apart):
        whole = Full.fit(model, loss, data, **options)
        assert whole.count == count
        assert_close(whole.to_dense(), F / count, 1e-9)


@pytest.mark.parametrize("family", ["Llama", "Mistral", "Qwen2", "Gemma"])
def test_models_that_compute_in_float32_inside(transformers: Any, family: str) -> None:
    """Their round-off in float64 is no sign of samples that interact."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(
        vocab_size=11,
        hidden_size=8,
        intermediate_size=12,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=4,
        max_position_embeddings=16,
        pad_token_id=0,
    )
    model = getattr(transformers, f"{family}ForCausalLM")(config).to(DOUBLE).eval()
    inputs = {"input_ids": torch.randint(1, 11, (SAMPLES, 4))}
    rows = jacobian(model, inputs, output=lambda found: found.logits[:, -1])
    assert_close(rows.dense(), gradients(model, model(**inputs).logits[:, -1]), 1e-5)


@pytest.fixture(scope="module")
def t5(transformers: Any) -> Callable[..., tuple[nn.Module, dict[str, Tensor]]]:
    """An encoder and a decoder, with normalisations of the library's own and biases by distance that all samples share."""

    def build(T: int, U: int, *, tied: bool) -> tuple[nn.Module, dict[str, Tensor]]:
        torch.manual_seed(0)
        config = transformers.T5Config(
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
        return transformers.T5ForConditionalGeneration(config).to(DOUBLE).eval(), inputs

    return build


@pytest.mark.parametrize(("T", "U", "tied"), [(4, 2, True), (3, 3, False)])
def test_t5(t5: Any, T: int, U: int, tied: bool) -> None:
    """Also where a table of positions has as many rows as there are samples. The normalisations compute in float32."""
    model, inputs = t5(T, U, tied=tied)
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
    table = compare(model, loss, (inputs, y), ["full", "kfac"], damping=[damping], output=pick)
    assert table["cosine"][0] == pytest.approx(1, abs=1e-6)
    for key in ("kfac", "full"):
        preconditioner = Preconditioner(model, loss, key, kind="exact", damping=damping)
        model.zero_grad()
        with preconditioner.collect():
            loss(pick(model(**inputs)), y).backward()
        gradient = torch.cat([q.grad.flatten() for q in model.parameters()])
        preconditioner.precondition()
        step = torch.cat([q.grad.flatten() for q in model.parameters()])
        assert_close(step, make(key).update(rows).solve(gradient, damping), 1e-9)
        if key == "full":
            assert_close(step, torch.linalg.solve(F + damping * torch.eye(len(F), dtype=DOUBLE), gradient), 1e-9)


EXPERTS, CHOSEN, WIDTH = 3, 2, 6


def moe(library: Any) -> nn.Module:
    config = library.MixtralConfig(
        vocab_size=5,
        hidden_size=4,
        intermediate_size=WIDTH,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=2,
        max_position_embeddings=8,
        num_local_experts=EXPERTS,
        num_experts_per_tok=CHOSEN,
        experts_implementation="eager",
    )
    return moved(library.MixtralForCausalLM(config)).to(DOUBLE).eval()


def moved(model: nn.Module) -> nn.Module:
    """Move parameters away from their first values, at which layers hardly differ."""
    torch.manual_seed(3)
    for parameter in model.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    return model


def per_token(model: nn.Module, x: dict[str, Tensor], labels: Tensor) -> Tensor:
    """Return the gradients of the losses of all tokens that count."""
    z = model(**x).logits.mT
    values = nn.CrossEntropyLoss(reduction="none")(z, labels)
    parameters = [p for p in model.parameters() if p.requires_grad]
    rows = [
        torch.autograd.grad(value, parameters, retain_graph=True, materialize_grads=True)
        for value in values[labels >= 0]
    ]
    return torch.stack([torch.cat([g.flatten() for g in row]) for row in rows])


def masked_tokens(vocabulary: int, T: int = 5) -> tuple[dict[str, Tensor], Tensor]:
    """Return inputs with padding, and labels that leave it out."""
    mask = (torch.arange(T) < torch.tensor([T, T - 2, T - 1])[:, None]).long()
    tokens = torch.randint(1, vocabulary, (SAMPLES, T))
    return {"input_ids": tokens, "attention_mask": mask}, torch.where(mask == 1, tokens.roll(-1, 1), -100)


def test_experts_have_factored_rows(transformers: Any, caplog: pytest.LogCaptureFixture) -> None:
    """Weights of all experts in one parameter; a token meets those of the experts that it was sent to."""
    model, loss, options = moe(transformers), nn.CrossEntropyLoss(), {"kind": "empirical", "output": last_axis_second}
    x, y = masked_tokens(5)
    rows = sqrt_fisher(model, loss, x, y, **options)  # type: ignore[arg-type]
    g = per_token(model, x, y)
    assert_close(rows.dense().T @ rows.dense(), g.T @ g / len(g), 1e-5)
    experts = [layer for layer in rows.layers if ".experts." in layer.name]
    assert [layer.name.rpartition(".")[2] for layer in experts] == ["gate_up_proj", "down_proj"]
    for layer in experts:
        assert isinstance(layer, KroneckerRows)
        assert layer.lengths is not None
        assert layer.lengths.sum(1).tolist() == [5 * CHOSEN] * SAMPLES
        assert layer.a.shape[1] == int(layer.lengths.max())
    assert "for every batch" not in caplog.text
    whole = sqrt_fisher(model, loss, x, y, rows="batch", **options)  # type: ignore[arg-type]
    assert_close(whole.dense()[0], g.sum(0) / len(g), 1e-5)
    # In two batches of different lengths, on the side of rows, which are kept together.
    parts = [({k: v[:1] for k, v in x.items()}, y[:1]), ({k: v[1:, :4] for k, v in x.items()}, y[1:, :4])]
    by_sample = [
        per_token(model, {k: v[n : n + 1] for k, v in x_.items()}, y_[n : n + 1]).sum(0)
        for x_, y_ in parts
        for n in range(len(y_))
    ]
    S = torch.stack(by_sample)
    count = sum(int((y_ >= 0).sum()) for _, y_ in parts)
    fit = Full.fit(model, loss, parts, side="rows", rows="sample", **options)  # type: ignore[arg-type]
    assert_close(fit.to_dense(), S.T @ S / count, 1e-5)


def test_kfac_of_experts(transformers: Any) -> None:
    """One pair of factors an expert, over the tokens that it was sent, against an own forward pass of the experts."""
    model, loss = moe(transformers), nn.CrossEntropyLoss()
    x, y = masked_tokens(5)
    experts: Any = model.get_submodule("model.layers.0.mlp.experts")
    seen: dict[str, Any] = {}

    def forward(h: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        total = torch.zeros_like(h)
        seen["sent"] = [(t, int(e)) for t, own in enumerate(index) for e in own]
        seen["inputs"], seen["inside"] = [], []
        for (t, e), w in zip(seen["sent"], weights.flatten(), strict=True):
            inside = experts.gate_up_proj[e] @ h[t]
            seen["inputs"].append(h[t].detach())
            seen["inside"].append(inside)
            total[t] = total[t] + w * (experts.down_proj[e] @ experts._apply_gate(inside[None])[0])
        return total

    experts.forward = forward
    values = nn.CrossEntropyLoss(reduction="none")(model(**x).logits.mT, y)
    omega = (y >= 0).sum(1).to(DOUBLE)
    g = torch.zeros(int(omega.sum()), len(seen["sent"]), 2 * WIDTH, dtype=DOUBLE)
    for row, value in zip(g, values[y >= 0], strict=True):
        row.copy_(torch.stack(torch.autograd.grad(value, seen["inside"], retain_graph=True, materialize_grads=True)))
    del experts.forward
    blocks = []
    for e in range(EXPERTS):
        own = [k for k, (_, other) in enumerate(seen["sent"]) if other == e]
        B = torch.einsum("rko,rkp->op", g[:, own], g[:, own]) / omega.sum()
        A = torch.zeros(4, 4, dtype=DOUBLE)
        for n in range(SAMPLES):
            mine = [seen["inputs"][k] for k in own if seen["sent"][k][0] // 5 == n]
            A += omega[n] / omega.sum() * sum(torch.outer(a, a) for a in mine) / max(len(mine), 1)
        blocks.append(torch.kron(B, A))
    options: Any = {"kind": "empirical", "output": last_axis_second}
    for structure in (
        KFAC().update(sqrt_fisher(model, loss, x, y, **options)),
        KFAC.fit(model, loss, (x, y), **options),
    ):
        dense, start = structure.to_dense(), 0
        for name, shape in structure.space.shapes.items():
            if name.endswith("gate_up_proj"):
                break
            start += shape.numel()
        part = slice(start, start + shape.numel())
        assert_close(dense[part, part], torch.block_diag(*blocks), 1e-5)


@pytest.mark.parametrize("structure", ["kfac", "ekfac", "full"])
def test_a_training_step_with_experts(transformers: Any, structure: str) -> None:
    model, loss = moe(transformers), nn.CrossEntropyLoss()
    x, y = masked_tokens(5)
    options: Any = {"kind": "empirical", "rows": "term"}
    training = Preconditioner(model, loss, structure, damping=0.1, **options)
    with training.collect():
        loss(model(**x).logits.mT, y).backward()
    gradient = torch.cat([p.grad.flatten() for p in model.parameters()])  # type: ignore[union-attr]
    training.precondition()
    step = torch.cat([p.grad.flatten() for p in model.parameters()])  # type: ignore[union-attr]
    expected = make(structure).update(sqrt_fisher(model, loss, x, y, output=last_axis_second, **options))
    assert_close(step, expected.solve(gradient, 0.1), 1e-5)


# --- every family, every kind of rows ---------------------------------------------------------------------------------


def llama(library: Any, **more: Any) -> nn.Module:
    config = library.LlamaConfig(
        vocab_size=5,
        hidden_size=4,
        intermediate_size=6,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=2,
        max_position_embeddings=8,
        pad_token_id=0,
        **more,
    )
    return moved(library.LlamaForCausalLM(config)).to(DOUBLE).eval()


def small_gpt2(library: Any) -> nn.Module:
    config = library.GPT2Config(
        vocab_size=5, n_positions=6, n_embd=4, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0
    )
    return moved(library.GPT2LMHeadModel(config)).to(DOUBLE).eval()


def small_bert(library: Any, kind: str) -> nn.Module:
    config = library.BertConfig(
        vocab_size=5,
        hidden_size=4,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=6,
        max_position_embeddings=6,
        num_labels=3,
    )
    return moved(getattr(library, f"BertFor{kind}")(config)).to(DOUBLE).eval()


Case = tuple[nn.Module, dict[str, Tensor], Any, Tensor]
"""A model, its inputs, how its outputs `[N, C, …]` are picked, and the targets."""


def of_tokens(model: nn.Module) -> Case:
    x, y = masked_tokens(5)
    return model, x, last_axis_second, y


def embedded(library: Any) -> Case:
    model = small_gpt2(library)
    x, y = masked_tokens(5)
    x["inputs_embeds"] = torch.randn(*x.pop("input_ids").shape, 4, dtype=DOUBLE)
    return model, x, last_axis_second, y


def packed(library: Any) -> Case:
    """Several sequences in one, whose positions begin anew."""
    tokens, places = torch.randint(1, 5, (2, 6)), torch.tensor([[0, 1, 2, 0, 1, 2], [0, 1, 0, 1, 2, 3]])
    own = (places == 0).cumsum(1)
    mask = (own[:, :, None] == own[:, None]) & torch.ones(6, 6, dtype=torch.bool).tril()
    labels = torch.where(own.roll(-1, 1) == own, tokens.roll(-1, 1), -100)
    labels[:, -1] = -100
    x = {"input_ids": tokens, "position_ids": places, "attention_mask": mask[:, None]}
    return llama(library), x, last_axis_second, labels


def masked_language_model(library: Any) -> Case:
    model, x, pick, y = of_tokens(small_bert(library, "MaskedLM"))
    return model, x, pick, torch.where(torch.rand(y.shape) < 0.6, y, -100)


def classifier(library: Any) -> Case:
    model, x, _, _ = of_tokens(small_bert(library, "SequenceClassification"))
    x["token_type_ids"] = torch.randint(2, x["input_ids"].shape)
    return model, x, "logits", torch.tensor([0, 2, 1])


def images(library: Any) -> Case:
    model, x = vit(library)
    return moved(model).to(DOUBLE).eval(), x, "logits", torch.tensor([0, 2, 1])


FAMILIES: dict[str, Callable[[Any], Case]] = {
    "gpt2": lambda library: of_tokens(small_gpt2(library)),
    "embedded": embedded,
    "llama": lambda library: of_tokens(llama(library)),
    "llama-tied": lambda library: of_tokens(llama(library, tie_word_embeddings=True)),
    "packed": packed,
    "mixtral": lambda library: of_tokens(moe(library)),
    "bert-masked": masked_language_model,
    "bert-classes": classifier,
    "vit": images,
}
ROWS: dict[str, dict[str, Any]] = {
    "exact": {"kind": "exact"},
    "mc": {"kind": "mc"},
    "mc-term": {"kind": "mc", "rows": "term"},
    "empirical": {"kind": "empirical"},
    "sample": {"kind": "empirical", "rows": "sample"},
    "signs": {"kind": "empirical", "rows": "signs"},
}
HALF = 1e-5
"""Tolerance for models that compute their normalisations in float32."""


def check_rows(case: Case, options: dict[str, Any]) -> None:
    """Check rows against gradients of single outputs, by what they add up to or, of random ones, what they combine."""
    model, x, pick, y = case
    random = options["kind"] == "mc" or options.get("rows") == "signs"
    options = {**options, "output": pick, **({"generator": torch.Generator().manual_seed(1)} if random else {})}
    S = sqrt_fisher(model, nn.CrossEntropyLoss(), x, y, **options)
    z = model(**x)[pick] if isinstance(pick, str) else pick(model(**x))
    N, C = z.shape[:2]
    J, p, at = gradients(model, z).view(C, -1, N, S.P), z.detach().softmax(1).view(N, C, -1), y.view(N, -1)
    counts = (at >= 0).to(DOUBLE)
    count = float(counts.sum())
    assert S.count == count
    errors = p - torch.zeros_like(p).scatter_(1, at.clamp_min(0)[:, None], 1.0)
    g = torch.einsum("ctnp,nct,nt->ntp", J, errors, counts)
    dense = S.dense()
    if options["kind"] == "exact":
        H = torch.einsum("nct,cd->ncdt", p, torch.eye(C, dtype=DOUBLE)) - torch.einsum("nct,ndt->ncdt", p, p)
        assert_close(dense.T @ dense, torch.einsum("ctnp,ncdt,nt,dtnq->pq", J, H, counts, J) / count, HALF)
    elif options["kind"] == "mc":
        # Every term has p minus some unit vector; what that comes to is one of C values for each.
        V = S.shape[0]
        assert (1 if options.get("rows") is None else at.shape[1]) == V
        for n in range(N):
            used = counts[n] > 0
            J_n, p_n = J[:, used, n], p[n][:, used]
            unit = torch.eye(C, dtype=DOUBLE)
            drawn = torch.einsum("ctp,kct->ktp", J_n, p_n[None] - unit[:, :, None]) / count**0.5
            mine = dense.view(V, N, -1)[:, n]
            if V == 1:
                mine, drawn = mine[0], sums(drawn)
                assert float((drawn - mine).norm(dim=1).min()) < HALF * float(mine.norm())
            else:
                found = (drawn - mine[used]).norm(dim=2).min(0).values
                assert float(found.max()) < HALF * float(mine.norm())
                assert not mine[~used].any()
    elif options.get("rows") == "signs":
        for n in range(N):
            used = g[n][counts[n] > 0] / count**0.5
            combined = sums(torch.stack([used, -used]))
            assert float((combined - dense[n]).norm(dim=1).min()) < HALF * float(used.norm())
    else:
        expected = g.sum(1) if options.get("rows") == "sample" else g.flatten(0, 1)
        assert_close(dense.T @ dense, expected.T @ expected / count, HALF)


def sums(choices: Tensor) -> Tensor:
    """Return all sums over t of one of the choices `[K, t, P]` each, `[Kᵗ, P]`."""
    total = choices.new_zeros(1, choices.shape[2])
    for t in range(choices.shape[1]):
        total = (total[:, None] + choices[None, :, t]).flatten(0, 1)
    return total


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


def check_fit(case: Case, key: str, options: dict[str, Any]) -> None:
    """Check a fit against a structure of all rows, and a step in training against both."""
    model, x, pick, y = case
    loss, fresh = nn.CrossEntropyLoss(), lambda: torch.Generator().manual_seed(1)
    random = {"generator": fresh()} if options["kind"] == "mc" or options.get("rows") == "signs" else {}
    rows = sqrt_fisher(model, loss, x, y, output=pick, **options, **random)
    expected = make(key).update(rows)
    F = rows.dense().T @ rows.dense()
    if key == "full":
        assert_close(expected.to_dense(), F)
    if key == "diagonal":
        assert_close(expected.to_dense(), F.diagonal().diag())
    random = {"generator": fresh()} if random else {}
    fit = type(expected).fit(model, loss, (x, y), output=pick, **options, **random)
    assert_close(fit.to_dense(), expected.to_dense(), HALF)
    training = Preconditioner(model, loss, key, damping=0.1, **options, seed=1)
    model.zero_grad()
    with training.collect():
        found = model(**x)
        loss(found[pick] if isinstance(pick, str) else pick(found), y).backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    gradient = torch.cat([torch.zeros(p.numel()) if p.grad is None else p.grad.flatten() for p in trained])
    training.precondition()
    step = torch.cat([p.grad.flatten() for p in trained])  # type: ignore[union-attr]
    assert_close(step, expected.solve(gradient, 0.1), HALF)


@pytest.mark.parametrize(
    ("family", "key", "rows"),
    [
        ("gpt2", "kfac", "mc"),
        ("llama", "ekfac", "empirical"),
        ("vit", "component-wise", "mc"),
        ("mixtral", "diagonal", "mc"),
    ],
)
def test_some_fits(transformers: Any, family: str, key: str, rows: str) -> None:
    torch.manual_seed(6)
    check_fit(FAMILIES[family](transformers), key, {"rows": None, **ROWS[rows]})


@pytest.mark.study
@pytest.mark.parametrize("rows", ["exact", "mc", "empirical", "sample"])
@pytest.mark.parametrize("key", ["full", "block-diagonal", "kfac", "ekfac", "diagonal", "component-wise"])
@pytest.mark.parametrize("family", FAMILIES)
def test_all_fits(transformers: Any, family: str, key: str, rows: str) -> None:
    torch.manual_seed(7)
    check_fit(FAMILIES[family](transformers), key, {"rows": "term" if rows == "empirical" else None, **ROWS[rows]})


@pytest.mark.parametrize("family", ["llama", "mixtral", "bert-masked"])
@pytest.mark.parametrize("kind", ["exact", "empirical"])
def test_batches_of_different_lengths_are_their_tokens(transformers: Any, family: str, kind: Any) -> None:
    """One batch, its sequences without padding, and all in one: the same matrix and count."""
    torch.manual_seed(8)
    model, x, pick, y = FAMILIES[family](transformers)
    lengths = x["attention_mask"].sum(1).tolist()
    apart = [({"input_ids": x["input_ids"][n : n + 1, :T]}, y[n : n + 1, :T]) for n, T in enumerate(lengths)]
    options: Any = {"kind": kind, "output": pick, "side": "parameters"}
    whole, parts = (Full.fit(model, nn.CrossEntropyLoss(), data, **options) for data in ((x, y), apart))
    assert whole.count == parts.count == int((y >= 0).sum())
    assert_close(parts.to_dense(), whole.to_dense(), HALF)


# --- how such models are trained --------------------------------------------------------------------------------------


def steps_of(model: nn.Module, passes: Callable[[nn.Module, nn.Module], Any], **options: Any) -> tuple[Tensor, Tensor]:
    """Return the gradient and the preconditioned one of passes `(model, loss) -> losses`, which share one step."""
    loss = nn.CrossEntropyLoss()
    training = Preconditioner(model, loss, **{"kind": "exact", "damping": 0.1, "seed": 1, **options})
    model.zero_grad()
    for run in passes(model, loss):
        with training.collect():
            run().backward()
    gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    training.precondition()
    return gradient, torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def test_labels_that_the_model_shifts_itself(transformers: Any) -> None:
    """The loss on shifted logits, flattened or not, and the model's own loss once it calls the one that is given."""
    torch.manual_seed(9)
    x, _ = masked_tokens(5)
    labels = torch.where(x["attention_mask"] == 1, x["input_ids"], -100)

    def with_classes_second(model: nn.Module, loss: nn.Module) -> Any:
        return [lambda: loss(model(**x).logits[:, :-1].mT, labels[:, 1:])]

    def flattened(model: nn.Module, loss: nn.Module) -> Any:
        return [lambda: loss(model(**x).logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())]

    def inside(model: nn.Module, loss: nn.Module) -> Any:
        def shifted(logits: Tensor, labels: Tensor, **_: Any) -> Tensor:
            return loss(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())

        model.loss_function = shifted
        return [lambda: model(**x, labels=labels).loss]

    model = small_gpt2(transformers)
    found = [steps_of(copy.deepcopy(model), way)[1] for way in (with_classes_second, flattened, inside)]
    assert_close(found[1], found[0])
    assert_close(found[2], found[0])

    def unknown_loss(model: nn.Module, _: nn.Module) -> Any:
        return [lambda: model(**x, labels=labels).loss]

    with pytest.raises(StateError, match=r"labels among its inputs.*sequence_models.md"):
        steps_of(model, unknown_loss)


@pytest.mark.parametrize("key", ["kfac", "full"])
def test_gradients_that_accumulate_over_batches_of_different_lengths(transformers: Any, key: str) -> None:
    """Losses are added up with the shares of their tokens; curvature is that of all tokens."""
    torch.manual_seed(10)
    model = llama(transformers)
    parts = [({"input_ids": torch.randint(1, 5, (n, T))}, torch.randint(5, (n, T))) for n, T in ((2, 3), (1, 5))]
    total = sum(y.numel() for _, y in parts)

    def passes(model: nn.Module, loss: nn.Module) -> Any:
        return [
            lambda x=x, y=y: loss(model(**x).logits.flatten(0, 1), y.flatten()) * y.numel() / total for x, y in parts
        ]

    options: Any = {} if key == "kfac" else {"side": "parameters"}
    gradient, step = steps_of(model, passes, structure=make(key, **options), decay=0.0)
    fit = type(make(key)).fit(model, nn.CrossEntropyLoss(), parts, output=last_axis_second, **options)
    assert_close(step, fit.solve(gradient, 0.1), HALF)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("kind", ["exact", "mc", "empirical"])
def test_gradient_checkpointing(transformers: Any, family: str, kind: Any) -> None:
    """Rows are those without it, in a sweep and in a pass of the user's, with dropout there, too."""
    torch.manual_seed(11)
    model, x, pick, y = FAMILIES[family](transformers)
    random = {"generator": torch.Generator().manual_seed(0)} if kind == "mc" else {}
    expected = sqrt_fisher(model, nn.CrossEntropyLoss(), x, y, kind, output=pick, **random).dense()
    without = model.train()

    def noisy(model: nn.Module, loss: nn.Module) -> Any:
        torch.manual_seed(12)
        return [lambda: loss(pick(model(**x)), y)]

    step = steps_of(without, noisy, kind=kind, rows=None)[1]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
        assert_close(steps_of(model, noisy, kind=kind, rows=None)[1], step, HALF)
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        random = {"generator": torch.Generator().manual_seed(0)} if kind == "mc" else {}
        found = sqrt_fisher(model, nn.CrossEntropyLoss(), x, y, kind, output=pick, **random).dense()
        assert_close(found, expected, HALF)
        model.gradient_checkpointing_enable({"use_reentrant": True})  # type: ignore[operator]
        with pytest.raises(UnsupportedModel, match=r"use_reentrant=True.*use_reentrant=False"):
            sqrt_fisher(model, nn.CrossEntropyLoss(), x, y, "exact", output=pick)


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

    def autocast(model: nn.Module, loss: nn.Module) -> Any:
        def run() -> Tensor:
            with torch.autocast("cpu", torch.bfloat16, enabled=cast == "autocast"):
                z = pick(model(**x))
            return loss(z.float(), y)  # type: ignore[no-any-return]

        return [run]

    gradient, step = steps_of(half, autocast)
    assert step.dtype == (torch.bfloat16 if cast == "weights" else torch.float32)
    assert relative(step.float(), found.solve(gradient.float(), 0.1)) < 4 * roundoff


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.fixture(scope="module")
def peft(transformers: Any) -> Any:
    return pytest.importorskip("peft", reason="peft is not installed")


def adapted(peft: Any, model: nn.Module, *targets: str, **more: Any) -> nn.Module:
    """Put adapters on a model, B away from zero."""
    torch.manual_seed(14)
    config = peft.LoraConfig(r=2, lora_alpha=4, target_modules=list(targets), **more)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted = peft.get_peft_model(model, config)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            parameter.data = 0.3 * torch.randn_like(parameter)
    return adapted.to(DOUBLE).eval()  # type: ignore[no-any-return]


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
    check_fit((model, x, pick, y), "kfac", {"rows": "term" if rows == "empirical" else None, **ROWS[rows]})
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
    "more", [{"use_dora": True}, {"modules_to_save": ["lm_head"]}, {"target": "embed_tokens"}], ids=str
)
def test_other_adapters(transformers: Any, peft: Any, more: dict[str, Any]) -> None:
    """Weights that are made of adapters, layers that are trained beside them, adapters of embeddings: exact, some dense."""
    model, x, pick, y = FAMILIES["llama"](transformers)
    more = dict(more)
    model = adapted(peft, model, "q_proj", *([more.pop("target")] if "target" in more else []), **more)
    check_rows((model, x, pick, y), ROWS["exact"])
    check_rows((model, x, pick, y), ROWS["empirical"])
