"""Losses on flattened logits: outputs `[N·T, C]` have the rows of the same outputs as `[N, C, T]`."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from oracle import DOUBLE, LOSSES, LossCase, loss_case
from torch import Tensor, nn

from curvlab import gram
from curvlab.errors import UnsupportedModel
from curvlab.nn import MultiTask, PerSample, Scaled, Task, WeightedCrossEntropy
from curvlab.rows import jacobian, sqrt_fisher
from curvlab.rows.collect import Collector
from curvlab.rows.factored import KroneckerRows
from curvlab.rows.layer import DenseRows
from curvlab.rows.owners import owners_of
from curvlab.rows.passes import Pass
from curvlab.rows.rows import Rows
from curvlab.testing.oracle import assert_close, count_of, dense_empirical, dense_ggn, dense_jacobian, outputs

N, T, C = 5, 4, 3


class Tokens(nn.Module):
    """A sequence model whose positions interact, with or without a parameter that has no rule.

    Args:
        way: "apart" returns `[N, C, T]`, "last" `[N, T, C]`, "flat" `[N·T, C]`; "deep" folds before the last layer.
        bare: whether there is a bare parameter.
    """

    def __init__(self, way: str, *, bare: bool) -> None:
        super().__init__()
        self.way = way
        self.embedding, self.body, self.norm = nn.Embedding(7, 4), nn.Linear(4, 5), nn.LayerNorm(5)
        self.head = nn.Linear(5, C)
        self.place = nn.Parameter(torch.randn(T, 4)) if bare else None

    def forward(self, x: Tensor) -> Tensor:
        h: Tensor = self.embedding(x)
        if self.place is not None:
            h = h + self.place
        h = self.norm(torch.tanh(self.body(h)).cumsum(1))
        if self.way == "deep":
            return self.head(h.reshape(-1, 5))
        z: Tensor = self.head(h)
        return {"apart": z.transpose(1, 2), "last": z, "flat": z.flatten(0, 1)}[self.way]


def tokens(way: str, *, bare: bool = True) -> Tokens:
    torch.manual_seed(0)
    return Tokens(way, bare=bare).to(DOUBLE)


def sequences() -> Tensor:
    return torch.randint(7, (N, T), generator=torch.Generator().manual_seed(1))


def flat_targets(y: Tensor) -> Tensor:
    """Fold `[N, T]`, or `[N, C, T]`."""
    return y.flatten() if y.ndim == 2 else y.transpose(1, 2).flatten(0, 1)


def random(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def collect(
    model: nn.Module,
    loss: nn.Module,
    inputs: Any,
    targets: Any,
    kind: str,
    *,
    rows: Any = None,
    call: Callable[[Any], Tensor] = lambda z: z.flatten(0, 1) if z.ndim == 3 else z,
) -> Collector:
    """Return the rows of a pass of the user's own, who flattens what the model returns."""
    model.zero_grad()
    how = Pass(kind, 1, random() if kind == "mc" else None, rows=rows)  # type: ignore[arg-type]
    with Collector(model, loss, owners_of(model), how) as found:
        loss(call(model(inputs)), targets).backward()
    return found


def rows_of(found: Collector) -> Rows:
    assert found.rows is not None
    return found.rows


def gradient(model: nn.Module) -> Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def swept(model: nn.Module, loss: nn.Module, x: Any, y: Any, kind: str) -> Rows:
    return sqrt_fisher(model, loss, x, y, kind, generator=random() if kind == "mc" else None)  # type: ignore[arg-type]


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("kind", ["exact", "ggn", "mc", "empirical"])
@pytest.mark.parametrize("losses", LOSSES, ids=lambda case: case.name)
def test_rows_are_those_of_positions_on_an_axis_of_their_own(losses: LossCase, kind: str, reduction: str) -> None:
    """The divisor of half the squared error is the length of the first axis, so rows are compared without."""
    x, apart, flat = sequences(), tokens("apart"), tokens("flat")
    loss, y = losses.make(outputs(apart, x), reduction)
    flat_loss, targets = losses.make(outputs(flat, x), reduction)[0], flat_targets(y)
    expected, found = swept(apart, loss, x, y, kind), swept(flat, flat_loss, x, targets, kind)
    assert found.shape == expected.shape
    assert_close(found.dense() * found.count**0.5, expected.dense() * expected.count**0.5)
    assert_close(found.sample_weights, expected.sample_weights)
    for way in ("last", "deep"):
        collector = collect(tokens(way), flat_loss, x, targets, kind)
        rows = rows_of(collector)
        assert_close(rows.dense() * rows.count**0.5, expected.dense() * expected.count**0.5)
        assert (rows.count, rows.terms) == (found.count, found.terms)
        assert_close(rows.sample_weights, expected.sample_weights)


@pytest.mark.parametrize("bare", [False, True], ids=["factored", "bare"])
@pytest.mark.parametrize("name", ["ce-all", "ce-soft", "mse", "bce-all"])
@pytest.mark.parametrize("way", ["last", "flat", "deep"])
def test_both_paths_give_the_matrices_of_definitions(way: str, name: str, bare: bool) -> None:
    x, model = sequences(), tokens(way, bare=bare)
    flat = tokens("flat", bare=bare)
    z = outputs(flat, x)
    loss, y = loss_case(name).make(z, "mean")
    J = dense_jacobian(flat, x)
    expected = {"exact": dense_ggn(J, loss, z, y), "empirical": dense_empirical(J, loss, z, y)}
    for kind, F in expected.items():
        found = collect(model, loss, x, y, kind)
        S = rows_of(found).dense()
        assert_close(S.T @ S, F)
        if found.coefficients is not None:
            assert_close(found.coefficients @ S, gradient(model), 1e-9)
        for layer in rows_of(found).layers:
            per_sample_gradient = found.per_sample_gradient(layer.layout.names[0])
            if per_sample_gradient is not None:
                g = rows_of(found).space.unflatten(gradient(model))
                for parameter, value in per_sample_gradient.layout.split(per_sample_gradient.total()).items():
                    assert_close(value, g[parameter], 1e-9)
        if way != "last":
            S = swept(model, loss, x, y, kind).dense()
            assert_close(S.T @ S, F)


@pytest.mark.parametrize("way", ["last", "deep"])
@pytest.mark.parametrize("name", ["ce-all", "bce-all"])
def test_rows_of_samples_are_whole_gradients_of_samples(name: str, way: str) -> None:
    x, model, flat = sequences(), tokens(way), tokens("flat")
    z = outputs(flat, x).requires_grad_()
    loss, y = loss_case(name).make(z.detach(), "mean")
    (slope,) = torch.autograd.grad(loss(z, y), z)
    J = dense_jacobian(flat, x).view(C, N, T, -1)
    expected = torch.einsum("cntp,ntc->np", J, slope.view(N, T, C)) * count_of(loss, z.detach(), y) ** 0.5
    found = collect(model, loss, x, y, "empirical", rows="sample")
    assert_close(rows_of(found).dense(), expected)
    assert found.coefficients is not None
    assert_close(found.coefficients @ expected, gradient(model), 1e-9)


def steep(z: Tensor, y: Tensor) -> Tensor:
    return torch.logsumexp(z, 1) - z.gather(1, y[:, None])[:, 0] + 0.1 * (z**4).sum(1)


TASKS = {
    "kind": Task(nn.CrossEntropyLoss(reduction="sum"), slice(0, 2)),
    "size": Task(nn.MSELoss(reduction="sum"), slice(2, 3), 0.5),
}
OTHERS: dict[str, tuple[nn.Module, Any]] = {
    "own": (PerSample(steep), torch.arange(N * T) % C),
    "own-sum": (PerSample(steep, reduction="sum"), torch.arange(N * T) % C),
    "scaled": (Scaled(nn.CrossEntropyLoss(), 2.5), torch.arange(N * T) % C),
    "weighted": (WeightedCrossEntropy(torch.linspace(0, 2, N * T, dtype=DOUBLE)), torch.arange(N * T) % C),
    "huber": (nn.HuberLoss(), torch.linspace(-3, 3, N * T * C, dtype=DOUBLE).view(-1, C)),
    "rate": (nn.PoissonNLLLoss(log_input=False), torch.arange(N * T * C).view(-1, C).to(DOUBLE) % 3),
    "tasks": (
        MultiTask(TASKS),
        {
            "kind": (torch.arange(N * T) % 2, torch.arange(N * T) % 3 > 0),
            "size": torch.linspace(-1, 1, N * T, dtype=DOUBLE)[:, None],
        },
    ),
}


@pytest.mark.parametrize("name", list(OTHERS))
def test_curvature_of_other_losses(name: str) -> None:
    loss, y = OTHERS[name]
    x = sequences()

    def model(way: str) -> nn.Module:
        return nn.Sequential(tokens(way), nn.Softplus()) if name == "rate" else tokens(way)

    flat, z = model("flat"), outputs(model("flat"), x)
    F = dense_ggn(dense_jacobian(flat, x), loss, z, y)
    for rows in (swept(flat, loss, x, y, "ggn"), rows_of(collect(model("last"), loss, x, y, "ggn"))):
        S = rows.dense()
        assert rows.shape == (C * T, N)
        assert_close(S.T @ S, F)


@pytest.mark.parametrize("kind", ["ggn", "empirical"])
@pytest.mark.parametrize("name", ["ce", "mse", "own"])
def test_folded_positions_may_have_further_axes(name: str, kind: str) -> None:
    """Frames of a film, each with a class a pixel: outputs `[N·T, C, X]`."""

    class Film(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.filters, self.bias = nn.Conv1d(2, C, 2), nn.Parameter(torch.randn(C, 1))

        def forward(self, film: Tensor) -> Tensor:
            z: Tensor = torch.tanh(self.filters(film.flatten(0, 1))) * self.bias
            return z

    def pixels(z: Tensor, y: Tensor) -> Tensor:
        return steep(z, y).sum(1) + z.flatten(1).sum(1).square()

    torch.manual_seed(0)
    model, film = Film().double(), torch.randn(3, 2, 2, 4, dtype=DOUBLE)
    z = outputs(model, film)
    if name == "own":
        loss, y = PerSample(pixels), torch.randint(C, (6, 3))
    else:
        loss, y = loss_case(name).make(z, "mean")
    J = dense_jacobian(model, film)
    if kind != "empirical":
        F = dense_ggn(J, loss, z, y)
    elif name != "own":
        F = dense_empirical(J, loss, z, y)
    else:
        at = z.clone().requires_grad_()
        (slope,) = torch.autograd.grad(loss(at, y), at)
        each = torch.einsum("cxmp,mcx->mp", J.view(C, 3, 6, -1), slope)
        F = 6 * each.T @ each
    for rows in (swept(model, loss, film, y, kind), rows_of(collect(model, loss, film, y, kind, call=lambda z: z))):
        assert rows.shape[1] == 3
        S = rows.dense()
        assert_close(S.T @ S, F)


def test_layers_that_see_folded_positions_stay_factored() -> None:
    class Frames(nn.Module):
        """Looks at every frame of a film by itself."""

        def __init__(self) -> None:
            super().__init__()
            self.filters, self.norm = nn.Conv2d(1, 2, 2), nn.GroupNorm(1, 2)
            self.head, self.last = nn.Linear(8, 4), nn.Linear(4, C)

        def forward(self, film: Tensor) -> Tensor:
            h = torch.tanh(self.norm(self.filters(film.flatten(0, 1)))).flatten(1)
            return self.last(torch.tanh(self.head(h)).unflatten(0, (len(film), -1)).mean(1))

    torch.manual_seed(0)
    model, film = Frames().double(), torch.randn(N, T, 1, 3, 3, dtype=DOUBLE)
    rows = jacobian(model, film)
    assert [type(layer) for layer in rows.layers] == [KroneckerRows, DenseRows, KroneckerRows, KroneckerRows]
    assert_close(rows.dense(), dense_jacobian(model, film))
    loss, y = nn.CrossEntropyLoss(weight=torch.tensor([0.5, 1.0, 2.0], dtype=DOUBLE)), torch.arange(N) % C
    for kind in ("exact", "empirical"):
        found = collect(model, loss, film, y, kind)
        assert_close(rows_of(found).dense(), swept(model, loss, film, y, kind).dense())


@pytest.mark.parametrize("kind", ["exact", "empirical"])
def test_what_lies_between_the_model_and_the_loss_is_followed(kind: str) -> None:
    """A language model's loss leaves out the last position; its model returns a dictionary."""

    class Shifted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = tokens("last")

        def forward(self, x: Tensor) -> Tensor:
            z: Tensor = self.inner(x)[:, :-1] / 2
            return z.flatten(0, 1)

    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = tokens("last")

        def forward(self, x: Tensor) -> dict[str, Any]:
            z = self.inner(x)
            return {"length": x.shape[1], "hidden": z, "logits": 2 * z}

    x, model, flat = sequences(), Named(), Shifted()
    z = outputs(flat, x)
    loss, y = loss_case("ce").make(z, "mean")
    J = dense_jacobian(flat, x)
    F = dense_ggn(J, loss, z, y) if kind == "exact" else dense_empirical(J, loss, z, y)
    S = rows_of(collect(model, loss, x, y, kind, call=lambda r: r["logits"][:, :-1].reshape(-1, C) / 4)).dense()
    assert_close(S.T @ S, F)


def test_batch_normalisation_of_folded_positions_in_training() -> None:
    class Normalised(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.norm, self.head = nn.Embedding(7, 4), nn.BatchNorm1d(4), nn.Linear(4, C)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(torch.tanh(self.norm(self.embedding(x).flatten(0, 1))))

    torch.manual_seed(0)
    model, loss, y = Normalised().double(), nn.CrossEntropyLoss(), torch.arange(N * T) % C
    how = Pass("empirical", rows="sample")
    with Collector(model, loss, owners_of(model, fixed=False), how, coupled=["norm"]) as found:
        loss(model(sequences()), y).backward()
    assert found.coefficients is not None
    assert rows_of(found).shape == (1, N)
    assert_close(found.coefficients @ rows_of(found).dense(), gradient(model), 1e-9)


def test_a_batch_of_one_sequence() -> None:
    x, apart = sequences()[:1], tokens("apart")
    loss = nn.CrossEntropyLoss()
    y = torch.arange(T)[None] % C
    expected = swept(apart, loss, x, y, "exact")
    assert_close(swept(tokens("flat"), loss, x, y.flatten(), "exact").dense(), expected.dense())
    assert_close(rows_of(collect(tokens("last"), loss, x, y.flatten(), "exact")).dense(), expected.dense())


def test_inputs_that_samples_share_do_not_number_them() -> None:
    class OnGrid(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.scale = nn.Linear(3, C), nn.Parameter(torch.randn(2))

        def forward(self, inputs: tuple[Tensor, Tensor]) -> Tensor:
            grid, x = inputs
            return self.layer(x) * (grid * self.scale).sum()

    torch.manual_seed(0)
    model, loss, y = OnGrid().double(), nn.CrossEntropyLoss(), torch.arange(6) % C
    inputs = (torch.randn(2, 2, dtype=DOUBLE), torch.randn(6, 3, dtype=DOUBLE))
    rows = rows_of(collect(model, loss, inputs, y, "exact"))
    assert rows.shape == (C, 6)
    assert_close(rows.dense(), swept(model, loss, (inputs,), y, "exact").dense())


def test_gram_matrices_of_flattened_outputs() -> None:
    x = sequences()
    expected = jacobian(tokens("apart"), x).gram()
    assert_close(jacobian(tokens("flat"), x).gram(), expected)
    assert_close(gram(tokens("flat"), x, memory="200KiB"), expected)
    weights = torch.linspace(0, 2, N * T, dtype=DOUBLE)
    for loss in (nn.CrossEntropyLoss(ignore_index=1), WeightedCrossEntropy(weights)):
        y = torch.arange(N * T) % C
        expected = swept(tokens("flat"), loss, x, y, "exact").gram()
        assert_close(gram(tokens("flat"), (x, y), loss=loss, memory="200KiB"), expected)
        with pytest.raises(ValueError, match=r"perhaps with positions folded into it, but their lengths are \[5, 19\]"):
            gram(tokens("flat"), (x, y[1:]), loss=loss)


class TestRefusals:
    """The checks hold for positions that are folded into the first axis."""

    @pytest.mark.parametrize("kind", ["exact", "mc", "empirical"])
    @pytest.mark.parametrize("bare", [False, True])
    def test_samples_that_interact(self, kind: str, bare: bool) -> None:
        loss, y = nn.CrossEntropyLoss(), torch.arange(N * T) % C
        with pytest.raises(UnsupportedModel, match="Either samples interact"):
            collect(tokens("last", bare=bare), loss, sequences(), y, kind, call=lambda z: (z - z.mean(0)).flatten(0, 1))
        mixing = nn.Sequential(tokens("flat", bare=bare), Mixing())
        with pytest.raises(UnsupportedModel, match="Either samples interact"):
            swept(mixing, loss, sequences(), y, kind)

    @pytest.mark.parametrize("kind", ["exact", "mc", "empirical"])
    def test_positions_that_are_not_folded_sample_by_sample(self, kind: str) -> None:
        loss, y = nn.CrossEntropyLoss(), torch.arange(N * T) % C
        with pytest.raises(UnsupportedModel, match="first axis of the model's inputs and outputs is not the sample"):
            collect(tokens("last"), loss, sequences(), y, kind, call=lambda z: z.transpose(0, 1).flatten(0, 1))

    @pytest.mark.parametrize("left", [N * T - 1, N * (T - 1)])
    @pytest.mark.parametrize("kind", ["exact", "mc", "empirical"])
    def test_positions_that_are_left_out(self, kind: str, left: int) -> None:
        kept = torch.randperm(N * T, generator=random())[:left].sort().values
        loss, y = nn.CrossEntropyLoss(), torch.arange(left) % C
        with pytest.raises(UnsupportedModel, match=r"ignore_index|positions that were left out"):
            collect(tokens("last"), loss, sequences(), y, kind, call=lambda z: z.flatten(0, 1)[kept])

    def test_outputs_that_the_model_did_not_return(self) -> None:
        class Hidden(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.inner, self.scale = tokens("flat"), nn.Parameter(torch.ones((), dtype=DOUBLE))

            def forward(self, x: Tensor) -> Tensor:
                self.logits = self.inner(x) / self.scale
                return self.logits.detach()

        model = Hidden()
        with pytest.raises(UnsupportedModel, match=r"scale have no factored rows, .* not called on one tensor"):
            collect(
                model, nn.CrossEntropyLoss(), sequences(), torch.arange(N * T) % C, "mc", call=lambda _: model.logits
            )


class Mixing(nn.Module):
    """Takes the mean over the batch from outputs."""

    def forward(self, z: Tensor) -> Tensor:
        return z - z.mean(0)
