"""Small models of the transformers library with inputs and targets, and what is checked of rows, fits and steps of each."""

from collections.abc import Callable
from typing import Any

import torch
from oracle import DOUBLE
from torch import Tensor, nn

from curvlab.fisher import make
from curvlab.optim import Preconditioner
from curvlab.rows import sqrt_fisher
from curvlab.testing.oracle import assert_close

SAMPLES, VOCABULARY = 3, 5
SIZES = {"hidden_size": 4, "num_attention_heads": 2, "intermediate_size": 6}
"""What the configurations of most families call alike."""
SINGLE = 1e-5
"""Tolerance for models that compute their normalisations in float32."""
Case = tuple[nn.Module, dict[str, Tensor], Any, Tensor]
"""A model, its inputs, how its outputs `[N, C, …]` are picked, and the targets."""


# --- models -------------------------------------------------------------------------------------------------------------


def moved(model: nn.Module) -> nn.Module:
    """Move parameters away from their first values, at which layers hardly differ."""
    torch.manual_seed(3)
    for parameter in model.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    return model.to(DOUBLE).eval()


def decoder(library: Any, family: str, **more: Any) -> nn.Module:
    """Return a language model of a family whose configurations have the names of LLaMA's."""
    sizes = {"vocab_size": VOCABULARY, "max_position_embeddings": 8, "num_hidden_layers": 2}
    heads = {"num_key_value_heads": 1, "head_dim": 2}
    config = getattr(library, f"{family}Config")(pad_token_id=0, **{**SIZES, **sizes, **heads, **more})
    return moved(getattr(library, f"{family}ForCausalLM")(config))


def mixtral(library: Any) -> nn.Module:
    """Return a model each of whose tokens is sent to two of three experts."""
    experts = {"num_local_experts": 3, "num_experts_per_tok": 2, "experts_implementation": "eager"}
    return decoder(library, "Mixtral", num_hidden_layers=1, **experts)


def gpt2(library: Any) -> nn.Module:
    config = library.GPT2Config(
        vocab_size=VOCABULARY, n_positions=6, n_embd=4, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0
    )
    return moved(library.GPT2LMHeadModel(config))


def bert(library: Any, kind: str) -> nn.Module:
    config = library.BertConfig(
        vocab_size=VOCABULARY, num_hidden_layers=1, max_position_embeddings=6, num_labels=3, **SIZES
    )
    return moved(getattr(library, f"BertFor{kind}")(config))


# --- cases --------------------------------------------------------------------------------------------------------------


def last_axis_second(found: Any) -> Tensor:
    return found.logits.mT


def picked(found: Any, pick: Any) -> Tensor:
    return found[pick] if isinstance(pick, str) else pick(found)


def masked_tokens(T: int = 5) -> tuple[dict[str, Tensor], Tensor]:
    """Return inputs with padding, and labels that leave it out."""
    mask = (torch.arange(T) < torch.tensor([T, T - 2, T - 1])[:, None]).long()
    tokens = torch.randint(1, VOCABULARY, (SAMPLES, T))
    return {"input_ids": tokens, "attention_mask": mask}, torch.where(mask == 1, tokens.roll(-1, 1), -100)


def of_tokens(model: nn.Module) -> Case:
    x, y = masked_tokens()
    return model, x, last_axis_second, y


def embedded(library: Any) -> Case:
    model, x, pick, y = of_tokens(gpt2(library))
    x["inputs_embeds"] = torch.randn(*x.pop("input_ids").shape, 4, dtype=DOUBLE)
    return model, x, pick, y


def packed(library: Any) -> Case:
    """Several sequences in one, whose positions begin anew."""
    tokens, places = torch.randint(1, VOCABULARY, (2, 6)), torch.tensor([[0, 1, 2, 0, 1, 2], [0, 1, 0, 1, 2, 3]])
    own = (places == 0).cumsum(1)
    mask = (own[:, :, None] == own[:, None]) & torch.ones(6, 6, dtype=torch.bool).tril()
    labels = torch.where(own.roll(-1, 1) == own, tokens.roll(-1, 1), -100)
    labels[:, -1] = -100
    x = {"input_ids": tokens, "position_ids": places, "attention_mask": mask[:, None]}
    return decoder(library, "Llama"), x, last_axis_second, labels


def masked_language_model(library: Any) -> Case:
    model, x, pick, y = of_tokens(bert(library, "MaskedLM"))
    return model, x, pick, torch.where(torch.rand(y.shape) < 0.6, y, -100)


def classifier(library: Any) -> Case:
    model, x, _, _ = of_tokens(bert(library, "SequenceClassification"))
    x["token_type_ids"] = torch.randint(2, x["input_ids"].shape)
    return model, x, "logits", torch.tensor([0, 2, 1])


def images(library: Any) -> Case:
    config = library.ViTConfig(num_hidden_layers=2, image_size=4, patch_size=2, num_channels=2, num_labels=3, **SIZES)
    x = {"pixel_values": torch.randn(SAMPLES, 2, 4, 4, dtype=DOUBLE)}
    return moved(library.ViTForImageClassification(config)), x, "logits", torch.tensor([0, 2, 1])


FAMILIES: dict[str, Callable[[Any], Case]] = {
    "gpt2": lambda library: of_tokens(gpt2(library)),
    "embedded": embedded,
    "llama": lambda library: of_tokens(decoder(library, "Llama")),
    "llama-tied": lambda library: of_tokens(decoder(library, "Llama", tie_word_embeddings=True)),
    "packed": packed,
    "mixtral": lambda library: of_tokens(mixtral(library)),
    "bert-masked": masked_language_model,
    "bert-classes": classifier,
    "vit": images,
}
ROWS: dict[str, dict[str, Any]] = {
    "exact": {"kind": "exact"},
    "mc": {"kind": "mc"},
    "mc-term": {"kind": "mc", "rows": "term"},
    "empirical": {"kind": "empirical", "rows": "term"},
    "sample": {"kind": "empirical", "rows": "sample"},
    "signs": {"kind": "empirical", "rows": "signs"},
}


# --- references ---------------------------------------------------------------------------------------------------------


def gradients(model: nn.Module, z: Tensor) -> Tensor:
    """Return J in row order `(c, x, n)`, by one reverse pass a row."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    rows = z.flatten(1).T.flatten()
    found = [torch.autograd.grad(row, parameters, retain_graph=True, materialize_grads=True) for row in rows]
    return torch.stack([torch.cat([g.flatten() for g in row]) for row in found])


def per_token(model: nn.Module, x: dict[str, Tensor], labels: Tensor) -> Tensor:
    """Return the gradients of the losses of all tokens that count."""
    values = nn.CrossEntropyLoss(reduction="none")(model(**x).logits.mT, labels)
    return gradients(model, values[labels >= 0][:, None])


def sums(choices: Tensor) -> Tensor:
    """Return all sums over t of one of the choices `[K, t, P]` each, `[Kᵗ, P]`."""
    total = choices.new_zeros(1, choices.shape[2])
    for t in range(choices.shape[1]):
        total = (total[:, None] + choices[None, :, t]).flatten(0, 1)
    return total


def step_of(
    model: nn.Module, *passes: Callable[[nn.Module, nn.Module], Tensor], **options: Any
) -> tuple[Tensor, Tensor]:
    """Return the gradient, and what a step makes of it, of passes `(model, loss) -> value`, which share that step."""
    loss = nn.CrossEntropyLoss()
    training = Preconditioner(
        model, loss, **{"structure": "kfac", "kind": "exact", "damping": 0.1, "kl_clip": None, "seed": 1, **options}
    )
    model.zero_grad()
    for run in passes:
        with training.collect():
            run(model, loss).backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    gradient = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in trained])
    training.precondition()
    return gradient, torch.cat([p.grad.flatten() for p in trained])


# --- checks -------------------------------------------------------------------------------------------------------------


def drawing(options: dict[str, Any]) -> dict[str, torch.Generator]:
    """Return a generator, always the same one, for rows that are random."""
    random = options["kind"] == "mc" or options.get("rows") == "signs"
    return {"generator": torch.Generator().manual_seed(1)} if random else {}


def check_rows(case: Case, options: dict[str, Any]) -> None:
    """Check rows against gradients of single outputs, by what they add up to or, of random ones, what they combine."""
    model, x, pick, y = case
    S = sqrt_fisher(model, nn.CrossEntropyLoss(), x, y, output=pick, **options, **drawing(options))
    z = picked(model(**x), pick)
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
        assert_close(dense.T @ dense, torch.einsum("ctnp,ncdt,nt,dtnq->pq", J, H, counts, J) / count, SINGLE)
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
                assert float((drawn - mine).norm(dim=1).min()) < SINGLE * float(mine.norm())
            else:
                found = (drawn - mine[used]).norm(dim=2).min(0).values
                assert float(found.max()) < SINGLE * float(mine.norm())
                assert not mine[~used].any()
    elif options["rows"] == "signs":
        for n in range(N):
            used = g[n][counts[n] > 0] / count**0.5
            combined = sums(torch.stack([used, -used]))
            assert float((combined - dense[n]).norm(dim=1).min()) < SINGLE * float(used.norm())
    else:
        expected = g.sum(1) if options["rows"] == "sample" else g.flatten(0, 1)
        assert_close(dense.T @ dense, expected.T @ expected / count, SINGLE)


def check_fit(case: Case, key: str, options: dict[str, Any]) -> None:
    """Check a fit against a structure of all rows, and a step in training against both."""
    model, x, pick, y = case
    loss = nn.CrossEntropyLoss()
    rows = sqrt_fisher(model, loss, x, y, output=pick, **options, **drawing(options))
    expected = make(key).update(rows)
    F = rows.dense().T @ rows.dense()
    if key == "full":
        assert_close(expected.to_dense(), F)
    if key == "diagonal":
        assert_close(expected.to_dense(), F.diagonal().diag())
    fit = type(expected).fit(model, loss, (x, y), output=pick, **options, **drawing(options))
    assert_close(fit.to_dense(), expected.to_dense(), SINGLE)
    gradient, step = step_of(model, lambda model, loss: loss(picked(model(**x), pick), y), structure=key, **options)
    assert_close(step, expected.solve(gradient, 0.1), SINGLE)
