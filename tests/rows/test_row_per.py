"""What a row stands for: a loss term, a sample, a draw of signs, or the batch."""

from typing import Any

import pytest
import torch
from oracle import DOUBLE, loss_case
from row_cases import fisher, generator
from torch import Tensor, nn
from torch.func import jacrev

import curvlab
from curvlab.fisher import KFAC, STRUCTURES, make
from curvlab.rows import Rows, merge, sqrt_fisher
from curvlab.testing.oracle import assert_close, count_of, dense_empirical, dense_jacobian, outputs

N, T, C = 3, 4, 2
NAMES = ("ce", "ce-ignore", "ce-weights", "mse", "half", "bce-all")


class Tokens(nn.Module):
    """A table, attention over tokens, and a head whose outputs are `[N, C, T]`: tokens of a sample interact."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.query, self.norm = nn.Embedding(5, 4), nn.Linear(4, 4), nn.LayerNorm(4)
        self.scale, self.head = nn.Parameter(torch.tensor(0.7)), nn.Linear(4, C)

    def forward(self, x: Tensor) -> Tensor:
        h = self.table(x)
        h = h + self.scale * torch.softmax(self.query(h) @ h.mT, -1) @ h
        return self.head(torch.tanh(self.norm(h))).transpose(1, 2)


def case(name: str, reduction: str = "mean") -> tuple[nn.Module, nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    model, x = Tokens().to(DOUBLE), torch.randint(5, (N, T))
    loss, y = loss_case(name).make(outputs(model, x), reduction)
    return model, loss, x, y


def term_gradients(model: nn.Module, loss: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Return the gradients of all terms `[N, T, P]`, weights included, so that their sum is that of the loss times its count."""
    z, count = outputs(model, x), count_of(loss, outputs(model, x), y)

    def value(at: Tensor) -> Tensor:
        return loss(at, y) * count

    slopes = jacrev(value)(z)
    J = dense_jacobian(model, x).view(C, T, N, -1)
    return torch.einsum("nct,ctnp->ntp", slopes, J)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("name", NAMES)
def test_rows_are_those_of_their_definitions(name: str, reduction: str) -> None:
    model, loss, x, y = case(name, reduction)
    g, count = term_gradients(model, loss, x, y), count_of(loss, outputs(model, x), y)
    samples = sqrt_fisher(model, loss, x, y, "empirical", rows="sample")
    assert samples.shape == (1, N)
    assert_close(samples.dense(), g.sum(1) / count**0.5)
    batch = sqrt_fisher(model, loss, x, y, "empirical", rows="batch")
    assert batch.shape == (1, 1)
    gradient = torch.autograd.grad(loss(model(x), y), list(model.parameters()))
    assert_close(batch.dense()[0], torch.cat([part.flatten() for part in gradient]))
    assert_close(batch.dense()[0], g.sum((0, 1)) / count)
    assert (batch.count, batch.terms) == (samples.count, samples.terms)
    assert_close(batch.sample_weights[0], samples.sample_weights.sum())


@pytest.mark.parametrize("name", NAMES)
def test_rows_of_signs_are_signed_sums_of_the_rows_of_terms(name: str) -> None:
    """Each row is one of the 2^T sums, and rows with all of them once would have the matrix of terms."""
    model, loss, x, y = case(name)
    terms = sqrt_fisher(model, loss, x, y, "empirical").dense().view(T, N, -1)
    rows = sqrt_fisher(model, loss, x, y, "empirical", rows="signs", draws=5, generator=generator())
    assert rows.shape == (5, N)
    S = rows.dense().view(5, N, -1) * 5**0.5
    signs = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0], dtype=DOUBLE)] * T)
    sums = torch.einsum("st,tnp->snp", signs, terms)
    for draw in S:
        for n in range(N):
            assert float((sums[:, n] - draw[n]).norm(dim=1).min()) < 1e-9 * float(sums.norm())
    exact = dense_empirical(dense_jacobian(model, x), loss, outputs(model, x), y)
    assert_close(torch.einsum("snp,snq->pq", sums, sums) / len(signs), exact)


def test_the_covariance_of_drawn_rows_is_the_matrix_of_terms_at_the_rate_of_the_draws() -> None:
    model, loss, x, y = case("ce-ignore")
    source = generator(2)
    for kind, rows in (("mc", "sample"), ("empirical", "signs")):
        wanted = fisher(sqrt_fisher(model, loss, x, y, "exact" if kind == "mc" else "empirical"))

        def error(draws: int, kind: Any = kind, rows: Any = rows, wanted: Tensor = wanted) -> float:
            found = [
                fisher(sqrt_fisher(model, loss, x, y, kind, draws=draws, generator=source, rows=rows))
                for _ in range(25)
            ]
            return float(sum((F - wanted).square().sum() for F in found) / len(found)) ** 0.5

        few, many = error(10), error(1000)
        assert 7 < few / many < 14
        assert many < 0.2 * float(wanted.norm())


@pytest.mark.parametrize("key", ["full", "block-diagonal", "unit-wise", "diagonal", "kfac", "ekfac"])
@pytest.mark.parametrize(("kind", "rows"), [("mc", "sample"), ("empirical", "signs"), ("empirical", "sample")])
def test_a_fit_and_a_preconditioner_mean_the_same_by_a_word(key: str, kind: Any, rows: Any) -> None:
    model, loss, x, y = case("ce-weights")
    random = rows == "signs" or kind == "mc"
    fitted = STRUCTURES[key].fit(model, loss, (x, y), kind=kind, rows=rows, generator=generator() if random else None)
    trained = curvlab.optim.Preconditioner(model, loss, make(key), kind=kind, rows=rows, decay=0.0, kl_clip=None)
    with trained.collect():
        loss(model(x), y).backward()
    trained.precondition()
    assert_close(trained.structure.to_dense(), fitted.to_dense(), 1e-9)


@pytest.mark.parametrize("key", ["full", "kfac", "diagonal"])
def test_the_batch_of_a_step_is_that_of_all_passes(key: str) -> None:
    """Two passes before one step, with unequal weights, give the outer product of the whole gradient."""
    model, loss, x, y = case("ce-ignore")
    whole = curvlab.optim.Preconditioner(model, loss, make(key), kind="empirical", rows="batch", kl_clip=None)
    with whole.collect():
        loss(model(x), y).backward()
    whole.precondition()
    model.zero_grad()
    parts = curvlab.optim.Preconditioner(model, loss, make(key), kind="empirical", rows="batch", kl_clip=None)
    for n in (slice(0, 1), slice(1, N)):
        with parts.collect():
            (loss(model(x[n]), y[n]) * 0.5).backward()
    parts.precondition()
    assert_close(parts.structure.to_dense(), whole.structure.to_dense(), 1e-9)
    if key == "full":
        gradient = sqrt_fisher(model, loss, x, y, "empirical", rows="batch").dense()
        assert_close(whole.structure.to_dense(), gradient.T @ gradient, 1e-9)


def test_the_batch_row_of_samples_with_different_numbers_of_positions() -> None:
    """Positions that a sample lacks are left out, so that K-FAC's A does not count them."""
    model, loss, x, y = case("ce")
    parts = [sqrt_fisher(model, loss, x[:, :t], y[:, :t], "empirical", rows="sample") for t in (2, T)]
    merged = merge(parts)
    layer = next(layer for layer in merged.layers if layer.name == "query")
    assert layer.lengths is not None  # type: ignore[attr-defined]
    (whole,) = [layer.of_batch()]
    assert whole.inputs.shape[1] == N * (2 + T)  # type: ignore[attr-defined]
    assert_close(whole.dense(), layer.dense().sum(0, keepdim=True))


def test_batch_rows_take_batch_normalisation_in_training() -> None:
    """The gradient of a batch exists where those of samples do not."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 2)).to(DOUBLE)
    x, y, loss = torch.randn(6, 3, dtype=DOUBLE), torch.arange(6) % 2, nn.CrossEntropyLoss()
    trained = curvlab.optim.Preconditioner(
        model, loss, make("full"), kind="empirical", rows="batch", damping=0.1, kl_clip=None
    )
    with trained.collect():
        loss(model(x), y).backward()
    g = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    assert_close(trained.structure.update(trained._passes[0].rows).to_dense(), torch.outer(g, g), 1e-9)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("kind", "options", "says"),
    [
        ("exact", {"rows": "sample"}, "rows='sample' does not exist for kind='exact': use 'term'"),
        ("mc", {"rows": "batch"}, "rows='batch' does not exist for kind='mc': use 'sample' or 'term'"),
        ("empirical", {"rows": "signs"}, "rows='signs' draws at random: pass generator"),
        ("empirical", {"draws": 2}, "draws=2 has a meaning for kind='mc' and for rows='signs' only"),
    ],
)
def test_words_that_do_not_fit_are_refused(kind: Any, options: dict[str, Any], says: str) -> None:
    model, loss, x, y = case("ce")
    with pytest.raises(ValueError, match=says):
        sqrt_fisher(model, loss, x, y, kind, **options)


def test_rows_of_different_words_are_neither_stacked_nor_averaged() -> None:
    model, loss, x, y = case("ce")

    def made(rows: Any) -> Rows:
        return sqrt_fisher(model, loss, x, y, "empirical", rows=rows)

    with pytest.raises(ValueError, match="differ in what a row stands for: 'sample' and 'term'"):
        merge([made("sample"), made("term")])
    structure = KFAC().update(made("sample"))
    with pytest.raises(ValueError, match="what a row stands for is 'term', and was 'sample'"):
        structure.update(made("term"), 0.5)
    restored = KFAC()
    restored.load_state_dict(structure.state_dict())
    assert restored.shapes.per == "sample"


def test_a_gram_matrix_takes_all_words_but_the_batch() -> None:
    model, loss, x, y = case("ce")
    for rows in ("term", "sample", "signs"):
        how: Any = {"rows": rows, "kind": "empirical"}
        expected = sqrt_fisher(model, loss, x, y, generator=generator(), **how).gram()
        assert_close(curvlab.gram(model, (x, y), loss=loss, memory="1MiB", generator=generator(), **how), expected)
    with pytest.raises(ValueError, match="there is no Gram matrix"):
        curvlab.gram(model, (x, y), loss=loss, kind="empirical", rows="batch")
