"""Losses whose Hessian is no Fisher matrix, losses made of losses, and any loss of the user's own."""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from typing import Any

import pytest
import torch
from oracle import DOUBLE, architecture, loss_case
from torch import Tensor, nn
from torch.func import jacrev
from torch.nn import functional as F

import curvlab
from curvlab.errors import NotPositiveDefinite, UnsupportedModel, Weightless
from curvlab.fisher import EKFAC, KFAC, Full
from curvlab.nn import GaussianNLL, HalfSquaredError, MultiTask, PerSample, Scaled, Task, WeightedCrossEntropy
from curvlab.optim import NaturalGradient, Preconditioner
from curvlab.rows import Rows, merge, sqrt_fisher
from curvlab.rows.collect import Collector
from curvlab.rows.loss import loss_terms
from curvlab.rows.owners import owners_of
from curvlab.rows.passes import Pass
from curvlab.rows.streamed import bytes_of
from curvlab.spectrum import GGN, Hessian, rank
from curvlab.testing.oracle import assert_close, dense_ggn, dense_jacobian, output_major, outputs

Values = Callable[[Tensor, Tensor], Tensor]


def fisher(rows: Rows) -> Tensor:
    S = rows.dense()
    return S.T @ S


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def positive(z: Tensor) -> Tensor:
    return F.softplus(z) + 0.1


def same(z: Tensor) -> Tensor:
    return z


# --- user losses ------------------------------------------------------------------------------------------------------


def log_cosh(z: Tensor, y: Tensor) -> Tensor:
    return (z - y).cosh().log().flatten(1).sum(1)


def coupled_outputs(z: Tensor, y: Tensor) -> Tensor:
    """Convex in all outputs of a sample together, positions included."""
    return torch.logsumexp((z - y).flatten(1), 1) + 0.1 * (z.flatten(1) ** 4).sum(1) + z.flatten(1).sum(1).square()


def matched(z: Tensor, y: Tensor) -> Tensor:
    """Poisson counts of rate exp z₀, of a sum over the other outputs: of less than full rank."""
    return z[:, :1].exp().flatten(1).sum(1) - (y[:, :1] * z.sum(1, keepdim=True)).flatten(1).sum(1)


class Weighted(nn.Module):
    """A class-weighted mean, as a user would write it."""

    def __init__(self, reduction: str) -> None:
        super().__init__()
        self.reduction = reduction
        self.register_buffer("weight", torch.tensor([0.5, 1.0, 2.0], dtype=DOUBLE))

    def forward(self, z: Tensor, y: Tensor) -> Tensor:
        return 2 * F.cross_entropy(z, y, self.weight, reduction=self.reduction)


def weighted(z: Tensor, y: Tensor) -> Tensor:
    values = 2 * F.cross_entropy(z, y, torch.tensor([0.5, 1.0, 2.0], dtype=DOUBLE), reduction="none")
    return values.flatten(1).sum(1) if values.ndim > 1 else values


@dataclass(frozen=True)
class Case:
    """A loss of kind "ggn" only.

    Attributes:
        make: `reduction -> loss`.
        targets: `outputs -> targets`.
        values: `(z, y) -> [N, K]`, one value an empirical row, without the divisor.
        domain: what brings a model's outputs where the loss is defined.
    """

    name: str
    make: Callable[[str], nn.Module]
    targets: Callable[[Tensor], Tensor]
    values: Values
    domain: Callable[[Tensor], Tensor] = same


def by_position(function: Callable[..., Tensor], **options: Any) -> Values:
    return lambda z, y: function(z, y, reduction="none", **options).flatten(2).sum(1) if z.ndim > 2 else (
        function(z, y, reduction="none", **options).sum(1, keepdim=True)
    )  # fmt: skip


def per_sample(function: Values) -> Values:
    return lambda z, y: function(z, y)[:, None]


def normal(z: Tensor) -> Tensor:
    return z + torch.randn_like(z)


def counts(z: Tensor) -> Tensor:
    return torch.randint(4, z.shape).to(z)


def fractions(z: Tensor) -> Tensor:
    return torch.rand_like(z)


def labels(z: Tensor) -> Tensor:
    return torch.randint(z.shape[1], (z.shape[0], *z.shape[2:]))


CASES = [
    Case("huber", lambda r: nn.HuberLoss(r, 0.8), normal, by_position(F.huber_loss, delta=0.8)),
    Case("smooth-l1", lambda r: nn.SmoothL1Loss(reduction=r, beta=0.7), normal, by_position(F.smooth_l1_loss, beta=0.7)),
    Case(
        "poisson-rate",
        lambda r: nn.PoissonNLLLoss(log_input=False, eps=0.01, reduction=r),
        counts,
        by_position(F.poisson_nll_loss, log_input=False, eps=0.01),
        positive,
    ),
    Case(
        "probability", lambda r: nn.BCELoss(reduction=r), fractions, by_position(F.binary_cross_entropy), torch.sigmoid
    ),
    Case("log-cosh", lambda r: PerSample(log_cosh, r), normal, per_sample(log_cosh)),
    Case("coupled", lambda r: PerSample(coupled_outputs, r), normal, per_sample(coupled_outputs)),
    Case("low-rank", lambda r: PerSample(matched, r), counts, per_sample(matched)),
    Case(
        "multilabel",
        lambda r: nn.MultiLabelSoftMarginLoss(reduction=r),
        fractions,
        lambda z, y: F.multilabel_soft_margin_loss(z, y, reduction="none").reshape(len(z), -1).sum(1, keepdim=True),
    ),
    Case("weighted", Weighted, labels, per_sample(weighted)),
]  # fmt: skip
ALL = [pytest.param(case, id=case.name) for case in CASES]


def divisor(case: Case, z: Tensor, y: Tensor) -> float:
    return float(case.values(z, y).sum() / case.make("mean")(z, y))


@pytest.mark.parametrize("network", ["mlp", "conv1d-grid"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("case", ALL)
def test_ggn_and_empirical_rows_equal_their_definitions(case: Case, reduction: str, network: str) -> None:
    model, x = architecture(network).make(N=4)
    z, J = outputs(model, x, case.domain), dense_jacobian(model, x, case.domain)
    torch.manual_seed(1)
    y, loss = case.targets(z), case.make(reduction)
    rows = sqrt_fisher(model, loss, x, y, "ggn", output=case.domain)
    assert_close(fisher(rows), dense_ggn(J, loss, z, y))
    assert_close(rows.jacobian().dense(), J)
    count = divisor(case, z, y) if reduction == "mean" else 1.0
    assert rows.count == pytest.approx(count, rel=1e-12)
    assert rows.terms == pytest.approx(count if reduction == "mean" else 4, rel=1e-12)
    cotangents = jacrev(case.values)(z, y).flatten(0, 1).flatten(1) / count**0.5
    g = cotangents @ output_major(J, 4)
    empirical = sqrt_fisher(model, loss, x, y, "empirical", output=case.domain)
    assert_close(fisher(empirical), g.T @ g)
    halves = merge([sqrt_fisher(model, loss, x[n], y[n], "ggn", output=case.domain) for n in (slice(3), slice(3, 4))])
    assert_close(fisher(halves), fisher(rows))


@pytest.mark.parametrize("case", ALL)
def test_duals_and_projectors(case: Case) -> None:
    model, x = architecture("mlp").make(N=3)
    z = outputs(model, x, case.domain)
    torch.manual_seed(1)
    factor = loss_terms(case.make("mean"), z, case.targets(z)).root()
    A = factor.apply(torch.eye(3, dtype=DOUBLE)[:, None].expand(3, 3, 3)).transpose(0, 1)
    inverse = torch.linalg.pinv(A, rtol=1e-10)
    u = torch.randn(2, 3, 3, dtype=DOUBLE)
    assert_close(factor.dual(u), torch.einsum("nck,bcn->bkn", inverse, u))
    assert_close(factor.projector(), (A @ inverse).transpose(0, 1))
    assert_close(factor.weighed.T * 1.0, (A.abs().sum(2) > 0) * 1.0)


@pytest.mark.parametrize("case", ALL)
def test_exact_and_mc_are_refused_by_name(case: Case) -> None:
    model, x = architecture("mlp").make(N=3)
    z = outputs(model, x, case.domain)
    loss, y = case.make("mean"), case.targets(z)
    name = type(loss).__name__
    with pytest.raises(UnsupportedModel, match=rf"The Hessian of {name}.* is not known to be a Fisher.*kind='ggn'"):
        sqrt_fisher(model, loss, x, y, output=case.domain)
    if case.name not in ("poisson-rate", "probability"):
        with pytest.raises(UnsupportedModel, match=rf"{name}.* has no distribution of the targets.*kind='ggn'"):
            sqrt_fisher(model, loss, x, y, "mc", generator=generator(), output=case.domain)
    with pytest.raises(UnsupportedModel, match=rf"The Hessian of {name}.* is not known to be a Fisher"):
        GGN(model, loss, (x, y), kind="exact", output=case.domain)
    assert_close(
        GGN(model, loss, (x, y), output=case.domain).to_dense(),
        fisher(sqrt_fisher(model, loss, x, y, "ggn", output=case.domain)),
    )


def test_mc_rows_come_from_the_models_distribution() -> None:
    """Rates and probabilities as outputs: Fisher matrices 1/λ (but for ε) and 1/(p(1 − p)), which no target enters."""
    model, x = architecture("mlp").make(N=3)
    for name, variance in (
        ("poisson-rate", lambda z: z / (z + 0.01) ** 2),
        ("probability", lambda z: 1 / (z * (1 - z))),
    ):
        case = next(case for case in CASES if case.name == name)
        z, J = outputs(model, x, case.domain), dense_jacobian(model, x, case.domain)
        loss, y = case.make("mean"), case.targets(z)
        exact = J.T @ (variance(z).T.flatten() / 9)[:, None].mul(J)
        source = generator(2)
        few, many = (
            float(fisher(sqrt_fisher(model, loss, x, y, "mc", draws=s, generator=source, output=case.domain)).sub(exact).norm())
            for s in (100, 10_000)
        )  # fmt: skip
        assert many < 0.06 * float(exact.norm())
        assert many < few


def test_mean_of_empirical_over_binary_targets_is_the_fisher_matrix() -> None:
    model, x = architecture("mlp").make(N=1)
    p, J = outputs(model, x, torch.sigmoid), dense_jacobian(model, x, torch.sigmoid)
    mean = torch.zeros(J.shape[1], J.shape[1], dtype=DOUBLE)
    for bits in product((0.0, 1.0), repeat=3):
        y = torch.tensor([bits], dtype=DOUBLE)
        probability = float(torch.where(y > 0, p, 1 - p).prod())
        mean += probability * fisher(sqrt_fisher(model, nn.BCELoss(), x, y, "empirical", output=torch.sigmoid))
    assert_close(mean, J.T @ (J / (3 * p * (1 - p)).T))


def test_kinks_and_domains_are_named() -> None:
    model, x = architecture("mlp").make(N=3)
    y = outputs(model, x)
    y[1, 2] -= 1.0
    y[1, 2] = (y[1, 2] + 1.0) - 1.0
    loss = nn.HuberLoss(delta=float((outputs(model, x) - y).abs().max()))
    with pytest.raises(ValueError, match=r"HuberLoss has no Hessian where the residual is.*at sample 1"):
        sqrt_fisher(model, loss, x, y, "ggn")
    with pytest.raises(UnsupportedModel, match="beta=0 is the L1 loss"):
        sqrt_fisher(model, nn.SmoothL1Loss(beta=0.0), x, y, "ggn")
    with pytest.raises(ValueError, match=r"rates above 0, which sample \d has not"):
        sqrt_fisher(model, nn.PoissonNLLLoss(log_input=False), x, y, "ggn", output=lambda z: z - 10)
    with pytest.raises(ValueError, match="targets of at least 0, which sample 0 has not"):
        sqrt_fisher(model, nn.PoissonNLLLoss(log_input=False), x, -torch.ones_like(y), "ggn", output=positive)
    with pytest.raises(ValueError, match=r"probabilities between 0 and 1.*BCEWithLogitsLoss"):
        sqrt_fisher(model, nn.BCELoss(), x, torch.zeros_like(y), "ggn", output=lambda z: z - 10)


class TestOwn:
    def test_an_indefinite_hessian_is_named(self) -> None:
        model, x = architecture("mlp").make(N=4)
        z = outputs(model, x)

        def double_well(z: Tensor, y: Tensor) -> Tensor:
            return ((z.square() - y) ** 2).sum(1)

        y = torch.zeros(4, 3, dtype=DOUBLE)
        y[2] = 2 * z[2].square() + 1
        lowest = float((12 * z.square() - 4 * y).min())
        loss = PerSample(double_well)
        with pytest.raises(NotPositiveDefinite, match=rf"of sample 2 has the eigenvalue {lowest:.3g}, so.*empirical"):
            sqrt_fisher(model, loss, x, y, "ggn")
        assert sqrt_fisher(model, loss, x, y, "empirical").R == 4

    @pytest.mark.parametrize("N", [1, 2, 5])
    def test_a_loss_that_does_not_follow_its_reduction(self, N: int) -> None:
        class Fixed(nn.Module):
            reduction = "mean"

            def forward(self, z: Tensor, y: Tensor) -> Tensor:
                return F.huber_loss(z, y)

        model, x = architecture("mlp").make(N)
        with pytest.raises(UnsupportedModel, match=r"Fixed is not a sum over samples.*PerSample"):
            sqrt_fisher(model, Fixed(), x, torch.zeros(N, 3, dtype=DOUBLE), "ggn")

    @pytest.mark.parametrize(
        "function",
        [
            lambda z, _: ((z - z.mean(0)) ** 2).sum(1),
            lambda z, _: (z**2).sum(1) * ((z**2).sum(1) == (z**2).sum(1).max()),
            lambda z, _: torch.logsumexp(z @ z.T, 1),
        ],
        ids=["centred", "hardest", "contrastive"],
    )
    def test_samples_that_a_loss_couples(self, function: Values) -> None:
        model, x = architecture("mlp").make(N=5)
        for kind in ("ggn", "empirical"):
            with pytest.raises(UnsupportedModel, match=r"PerSample\(<lambda>\) is not a sum over samples"):
                sqrt_fisher(model, PerSample(function), x, torch.zeros(5), kind)  # type: ignore[arg-type]

    def test_losses_that_say_nothing_or_have_no_curvature(self) -> None:
        class Silent(nn.Module):
            def forward(self, z: Tensor, y: Tensor) -> Tensor:
                return F.mse_loss(z, y)

        class Fixed(Silent):
            @property
            def reduction(self) -> str:
                return "mean"

        model, x = architecture("mlp").make(N=3)
        y = torch.zeros(3, 3, dtype=DOUBLE)
        with pytest.raises(UnsupportedModel, match=r"Silent does not say whether it is a mean or a sum.*PerSample"):
            sqrt_fisher(model, Silent(), x, y, "ggn")
        with pytest.raises(UnsupportedModel, match="attribute reduction of Fixed cannot be set"):
            sqrt_fisher(model, Fixed(), x, y, "ggn")
        with pytest.raises(UnsupportedModel, match=r"HingeEmbeddingLoss is linear in the outputs"):
            sqrt_fisher(model, nn.HingeEmbeddingLoss(), x, torch.ones(3, 3, dtype=DOUBLE), "ggn")
        with pytest.raises(ValueError, match="must return one value a sample"):
            sqrt_fisher(model, PerSample(lambda z, y: (z - y).sum()), x, y, "ggn")
        bent = PerSample(lambda z, y: (z - y).abs().pow(1.5).sum(1) + z.sum(1))
        with pytest.raises(ValueError, match=r"Hessian of PerSample\(<lambda>\) is not finite, first at sample 1"):
            sqrt_fisher(model, bent, x, torch.cat([y[:1], outputs(model, x)[1:]]), "ggn")

    def test_a_subclass_keeps_its_own_forward_pass(self) -> None:
        """A class that overrides `forward` is not read as its base class."""

        class Doubled(nn.CrossEntropyLoss):
            def forward(self, input: Tensor, target: Tensor) -> Tensor:  # noqa: A002
                return 2 * super().forward(input, target)

        model, x = architecture("mlp").make(N=4)
        y = torch.tensor([0, -100, 2, 1])
        own = fisher(sqrt_fisher(model, Doubled(), x, y, "ggn"))
        assert_close(own, 2 * fisher(sqrt_fisher(model, nn.CrossEntropyLoss(), x, y)))

    def test_a_perfect_fit_has_a_divisor(self) -> None:
        model, x = architecture("mlp").make(N=3)
        y = outputs(model, x)
        rows = sqrt_fisher(model, PerSample(log_cosh), x, y, "ggn")
        assert rows.count == pytest.approx(3)
        assert_close(fisher(rows), fisher(sqrt_fisher(model, HalfSquaredError(), x, y)))

    def test_rank_structures_and_comparison(self) -> None:
        """What reads the factor at the output reads this one: ranks, undamped steps, states on disk."""
        model, x = architecture("mlp").make(N=3)
        loss, y = PerSample(matched), torch.ones(3, 3, dtype=DOUBLE)
        rows = sqrt_fisher(model, loss, x, y, "ggn")
        assert rank(rows).attainable == rank(rows).rank == 3
        table = curvlab.compare(model, loss, (x, y), ["full"], damping=[1e-3], kind="ggn")
        assert table["cosine"].item() == pytest.approx(1)
        for structure in (Full(), EKFAC()):
            structure.update(rows)
            copy = type(structure)()
            copy.load_state_dict(structure.state_dict())
            assert torch.equal(copy.to_dense(), structure.to_dense())
            if structure.averages:
                continue
            assert_close(copy.rows.dual(torch.ones(rows.R, dtype=DOUBLE)), rows.dual(torch.ones(rows.R, dtype=DOUBLE)))


@pytest.mark.parametrize("kind", ["exact", "ggn", "mc", "empirical"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_twice_a_loss_has_twice_the_curvature(kind: Any, reduction: str) -> None:
    model, x = architecture("conv1d-grid").make(N=3)
    loss, y = loss_case("ce-all").make(outputs(model, x), reduction)
    options = [{"generator": generator()} if kind == "mc" else {} for _ in range(2)]
    once = sqrt_fisher(model, loss, x, y, kind, **options[0])
    twice = sqrt_fisher(model, Scaled(loss, 2.0), x, y, kind, **options[1])
    assert_close(fisher(twice), 2 * fisher(once))
    assert (twice.count, twice.terms) == (once.count, once.terms)
    if kind != "mc":
        parts = [sqrt_fisher(model, Scaled(loss, 2.0), x[n], y[n], kind) for n in (slice(2), slice(2, 3))]
        assert_close(fisher(merge(parts)), fisher(twice))


@pytest.mark.parametrize("kind", ["ggn", "empirical"])
@pytest.mark.parametrize("case", ALL)
def test_rows_of_a_training_step(case: Case, kind: Any) -> None:
    """Rows that hooks collect from a user's own passes, who multiplies the loss by 3."""
    model, x = architecture("mlp").make(N=4)
    if case.domain is not same:
        model = nn.Sequential(model, {"poisson-rate": nn.Softplus(), "probability": nn.Sigmoid()}[case.name])
    loss, y = case.make("mean"), case.targets(outputs(model, x))
    with Collector(model, loss, owners_of(model), Pass(kind)) as found:
        (3 * loss(model(x), y)).backward()
    assert found.rows is not None
    S = found.rows.dense()
    assert_close(S, sqrt_fisher(model, loss, x, y, kind).dense())
    if kind == "ggn":
        assert found.coefficients is None  # the gradient need not lie in the range of this Hessian
    else:
        assert found.coefficients is not None
        assert_close(found.coefficients @ S, torch.cat([p.grad.flatten() for p in model.parameters()]), 1e-9)


def test_steps_keep_gradients_where_there_is_no_curvature() -> None:
    model, x = architecture("mlp").make(N=4)
    y = outputs(model, x) + 3.0
    y[0] -= 2.9
    loss = nn.HuberLoss()
    optimiser = NaturalGradient(model, loss, lr=1.0, structure="full", kind="ggn", damping=0.1)
    before = torch.cat([p.detach().flatten().clone() for p in model.parameters()])
    with optimiser.collect():
        loss(model(x), y).backward()
    g = torch.cat([p.grad.flatten() for p in model.parameters()])
    F_ = fisher(sqrt_fisher(model, loss, x, y, "ggn"))
    optimiser.step()
    after = torch.cat([p.detach().flatten() for p in model.parameters()])
    assert_close(before - after, torch.linalg.solve(F_ + 0.1 * torch.eye(len(g), dtype=DOUBLE), g), 1e-9)
    table = curvlab.compare(model, loss, (x, y), ["full", "diagonal"], damping=[1e-3], kind="ggn")
    assert table["cosine"][0] == pytest.approx(1)


# --- several tasks ----------------------------------------------------------------------------------------------------


def three_tasks(reduction: str) -> MultiTask:
    return MultiTask(
        {
            "depth": Task(HalfSquaredError("sum"), slice(0, 2), 0.5),
            "kind": Task(nn.CrossEntropyLoss(reduction="sum", ignore_index=-1), slice(2, 5), 2.0),
            "count": Task(nn.PoissonNLLLoss(reduction="sum"), slice(6, None)),
        },
        reduction,
    )


def tasks_data(extra: bool, masked: bool) -> tuple[nn.Module, Tensor, dict[str, Any]]:
    torch.manual_seed(0)
    layers = (
        (nn.Conv1d(2, 7, 2), nn.Tanh(), nn.Conv1d(7, 7, 1)) if extra else (nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 7))
    )
    model = nn.Sequential(*layers).double()
    x = torch.randn(4, *((2, 4) if extra else (3,)), dtype=DOUBLE)
    shape = (3,) if extra else ()
    y: dict[str, Any] = {
        "depth": torch.randn(4, 2, *shape, dtype=DOUBLE),
        "kind": torch.randint(3, (4, *shape)),
        "count": torch.randint(4, (4, 1, *shape)).to(DOUBLE),
    }
    y["kind"].view(-1)[0] = -1
    if masked:
        some = torch.tensor([True, False, True, True])
        y["depth"][1] = torch.nan
        y["depth"] = (y["depth"], some)
        y["count"] = (y["count"], torch.rand(4, *shape) < 0.5)
    return model, x, y


def selected(y: dict[str, Any], n: slice) -> dict[str, Any]:
    return {
        name: tuple(part[n] for part in value) if isinstance(value, tuple) else value[n] for name, value in y.items()
    }


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("extra", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_tasks(reduction: str, extra: bool, masked: bool) -> None:
    model, x, y = tasks_data(extra, masked)
    loss, z, J = three_tasks(reduction), outputs(model, x), dense_jacobian(model, x)
    rows = sqrt_fisher(model, loss, x, y)
    assert_close(fisher(rows), dense_ggn(J, loss, z, y))
    assert_close(GGN(model, loss, (x, y), kind="exact").to_dense(), fisher(rows))
    for kind in ("exact", "empirical"):
        whole = sqrt_fisher(model, loss, x, y, kind)  # type: ignore[arg-type]
        parts = [sqrt_fisher(model, loss, x[n], selected(y, n), kind) for n in (slice(1), slice(1, 4))]  # type: ignore[arg-type]
        assert_close(merge(parts).dense(), whole.dense())
        assert_close(merge(parts).sample_weights, whole.sample_weights)
    draws = sqrt_fisher(model, loss, x, y, "mc", draws=2000, generator=generator())
    assert float((fisher(draws) - fisher(rows)).norm()) < 0.1 * float(fisher(rows).norm())
    split = Full().fit(model, loss, [(x[n], selected(y, n)) for n in (slice(1), slice(1, 4))])
    assert_close(split.to_dense(), fisher(rows))
    assert_close(Full().fit(model, loss, (x, y)).to_dense(), fisher(rows))


@pytest.mark.parametrize("name", ["mse", "ce-all", "bce-all"])
@pytest.mark.parametrize("kind", ["exact", "empirical"])
def test_one_task_is_its_loss_and_tasks_add(name: str, kind: Any) -> None:
    model, x = architecture("conv1d-grid").make(N=3)
    z = outputs(model, x)
    alone, y = loss_case(name).make(z, "sum")
    one = sqrt_fisher(model, MultiTask({"a": Task(alone, slice(None), 3.0)}, "sum"), x, {"a": y}, kind)
    assert_close(fisher(one), 3 * fisher(sqrt_fisher(model, alone, x, y, kind)))
    tasks = {
        "a": Task(HalfSquaredError("sum"), slice(0, 1), 3.0),
        "b": Task(nn.BCEWithLogitsLoss(reduction="sum"), slice(1, 3)),
    }
    targets = {"a": torch.zeros_like(z[:, :1]), "b": torch.rand_like(z[:, 1:])}
    both = sqrt_fisher(model, MultiTask(tasks), x, targets, kind)
    apart = [
        sqrt_fisher(model, MultiTask({name: task}), x, {name: targets[name]}, kind) for name, task in tasks.items()
    ]
    assert_close(both.dense(), apart[0].dense() + apart[1].dense())


def test_a_task_of_ones_own_loss() -> None:
    model, x, y = tasks_data(extra=False, masked=True)
    tasks = dict(three_tasks("mean").tasks) | {"depth": Task(PerSample(log_cosh, "sum"), slice(0, 2), 0.5)}
    loss = MultiTask(tasks)
    rows = sqrt_fisher(model, loss, x, y, "ggn")
    assert_close(fisher(rows), dense_ggn(dense_jacobian(model, x), loss, outputs(model, x), y))
    with pytest.raises(UnsupportedModel, match=r"The Hessian of MultiTask\(PerSample, CrossEntropyLoss"):
        sqrt_fisher(model, loss, x, y)
    model, x, y = tasks_data(extra=True, masked=False)
    with pytest.raises(UnsupportedModel, match="of task 'depth' takes all positions of a sample at once"):
        sqrt_fisher(model, loss, x, y, "ggn")


def test_tasks_that_do_not_fit() -> None:
    half = HalfSquaredError("sum")
    z = torch.zeros(2, 3, dtype=DOUBLE)
    with pytest.raises(ValueError, match="there is no task"):
        MultiTask({})
    with pytest.raises(ValueError, match=r"HalfSquaredError of task 'a' needs reduction='sum'"):
        MultiTask({"a": Task(HalfSquaredError(), slice(1))})
    with pytest.raises(ValueError, match="weight of task 'a' must be at least 0, not -1"):
        MultiTask({"a": Task(half, slice(1), -1.0)})
    with pytest.raises(ValueError, match="have a step"):
        MultiTask({"a": Task(half, slice(0, 3, 2))})
    both = MultiTask({"a": Task(half, slice(0, 2)), "b": Task(half, slice(1, 3))})
    with pytest.raises(ValueError, match="Output 1 belongs to the tasks 'a' and 'b'"):
        both(z, {"a": z[:, :2], "b": z[:, 1:]})
    with pytest.raises(ValueError, match=r"targets for the tasks \['a', 'b'\], got \['a'\]"):
        both(z, {"a": z})
    with pytest.raises(ValueError, match="Task 'a' has none of the 3 outputs"):
        MultiTask({"a": Task(half, slice(3, 5))})(z, {"a": z})
    with pytest.raises(ValueError, match=r"mask of task 'a' must be bools of shape \[2\] or \[2\], got \[3\]"):
        MultiTask({"a": Task(half, slice(3))})(z, {"a": (z, torch.ones(3, dtype=torch.bool))})


def test_fixed_variances() -> None:
    z, y, variance = torch.randn(4, 3), torch.randn(4, 3), torch.tensor([0.5, 1.0, 3.0])
    for reduction in ("mean", "sum"):
        expected = F.gaussian_nll_loss(z, y, variance.expand_as(z), reduction=reduction)
        assert_close(GaussianNLL(variance, reduction)(z, y), expected, 1e-6)
    assert_close(GaussianNLL(2.0)(z, y), F.gaussian_nll_loss(z, y, torch.full_like(z, 2.0)), 1e-6)
    with pytest.raises(ValueError, match="variance must be positive, not 0"):
        GaussianNLL(0.0)
    with pytest.raises(ValueError, match="scale must be at least 0, not -1"):
        Scaled(nn.MSELoss(), -1.0)


# --- losses with hooks ------------------------------------------------------------------------------------------------


def tripled(loss: nn.Module) -> None:
    loss.register_forward_hook(lambda _, __, value: 3 * value)


def sharpened(loss: nn.Module) -> None:
    loss.register_forward_pre_hook(lambda _, args: (2 * args[0] + args[0] ** 2, args[1]))


def replaced(loss: nn.Module) -> None:
    forward = type(loss).forward
    loss.forward = lambda z, y: 3 * forward(loss, z, y)  # type: ignore[method-assign]


HOOKED = [
    (hook, loss, part)
    for hook in (tripled, sharpened, replaced)
    for loss in ("mse", "half", "ce")
    for part in (False, True)
]


def hooked(hook: Callable[[nn.Module], None], name: str, reduction: str, part: bool) -> tuple[nn.Module, Any, Any, Any]:
    model, x = architecture("mlp").make(N=4)
    loss, y = loss_case(name).make(0.1 * outputs(model, x), reduction)
    if hook is sharpened and name != "ce":
        y = y - 5  # so that the Hessian is definite
    hook(loss)
    return model, (Scaled(loss, 2.0) if part else loss), x, y


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize(("hook", "name", "part"), HOOKED)
def test_a_loss_with_hooks_is_what_the_user_calls(hook: Any, name: str, part: bool, reduction: str) -> None:
    model, loss, x, y = hooked(hook, name, reduction, part)
    if hook is replaced and reduction == "mean":
        with pytest.raises(UnsupportedModel, match=r"with its hooks is not a sum over samples(?s:.)*Wrap a function"):
            sqrt_fisher(model, loss, x, y, "ggn")
        return
    z, J = outputs(model, x), dense_jacobian(model, x)
    if hook is not sharpened or name != "ce":
        assert_close(fisher(sqrt_fisher(model, loss, x, y, "ggn")), dense_ggn(J, loss, z, y))
    empirical = sqrt_fisher(model, loss, x, y, "empirical")
    slopes = jacrev(lambda at: loss(at, y))(z) * (empirical.count / (2 if part else 1)) ** 0.5  # √w s, w the multiple
    cotangents = torch.einsum("nc,nm->ncm", slopes, torch.eye(len(z), dtype=DOUBLE)).permute(0, 2, 1).flatten(1)
    assert_close(fisher(empirical), (cotangents @ output_major(J, len(z))).mT @ (cotangents @ output_major(J, len(z))))
    for kind in ("exact", "mc"):
        with pytest.raises(UnsupportedModel, match="with its hooks"):
            sqrt_fisher(model, loss, x, y, kind, generator=generator())  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["ggn", "empirical"])
@pytest.mark.parametrize("hook", [tripled, sharpened])
def test_steps_with_a_loss_that_has_hooks(hook: Any, kind: Any) -> None:
    model, loss, x, y = hooked(hook, "mse", "mean", False)
    preconditioner = Preconditioner(model, loss, "full", kind=kind, damping=1e-2)
    with preconditioner.collect():
        loss(model(x), y).backward()
    g = torch.cat([p.grad.flatten() for p in model.parameters()])
    F_ = fisher(sqrt_fisher(model, loss, x, y, kind))
    preconditioner.precondition()
    step = torch.cat([p.grad.flatten() for p in model.parameters()])
    assert_close(step, torch.linalg.solve(F_ + 1e-2 * torch.eye(len(g), dtype=DOUBLE), g), 1e-8)
    assert len(loss._forward_hooks) + len(loss._forward_pre_hooks) == 1


def doubled_gradients(loss: nn.Module) -> None:
    loss.register_full_backward_hook(lambda _, into, __: tuple(None if g is None else 2 * g for g in into))


def tripled_gradients(loss: nn.Module) -> None:
    loss.register_full_backward_pre_hook(lambda _, out: tuple(3 * g for g in out))


@pytest.mark.parametrize("name", ["ce", "own", "part"])
@pytest.mark.parametrize("hook", [doubled_gradients, tripled_gradients])
def test_hooks_on_the_gradients_of_a_loss_are_no_part_of_it(hook: Any, name: str) -> None:
    """They change the gradient of the user's pass, which is preconditioned as it is."""
    model, x = architecture("mlp").make(N=4)
    y, inner = (
        torch.tensor([0, 1, 2, 0]),
        {"ce": nn.CrossEntropyLoss, "own": Skipping, "part": nn.CrossEntropyLoss}[name](),
    )
    loss = Scaled(inner, 1.0) if name == "part" else inner
    S = sqrt_fisher(model, loss, x, y, "ggn").dense()
    empirical, H = sqrt_fisher(model, loss, x, y, "empirical").dense(), Hessian(model, loss, (x, y)).to_dense()
    hook(inner)
    assert_close(sqrt_fisher(model, loss, x, y, "ggn").dense(), S)
    assert_close(sqrt_fisher(model, loss, x, y, "empirical").dense(), empirical)
    assert_close(GGN(model, loss, (x, y)).to_dense(), S.T @ S)
    assert_close(Hessian(model, loss, (x, y)).to_dense(), H)
    for kind, rows in (("ggn", S), ("empirical", empirical)):
        preconditioner = Preconditioner(model, loss, "full", kind=kind, damping=0.1)  # type: ignore[arg-type]
        model.zero_grad()
        with preconditioner.collect():
            loss(model(x), y).backward()
        g = torch.cat([p.grad.flatten() for p in model.parameters()])
        preconditioner.precondition()
        step = torch.cat([p.grad.flatten() for p in model.parameters()])
        assert_close(step, torch.linalg.solve(rows.T @ rows + 0.1 * torch.eye(len(g), dtype=DOUBLE), g), 1e-8)


def test_hooks_that_only_look_on_leave_a_loss_what_it_is() -> None:
    model, x = architecture("mlp").make(N=4)
    loss, y = loss_case("ce").make(outputs(model, x), "mean")
    expected = fisher(sqrt_fisher(model, loss, x, y))
    seen: list[Tensor] = []
    loss.register_forward_hook(lambda _, __, value: seen.append(value.detach()))
    assert_close(fisher(sqrt_fisher(model, loss, x, y)), expected)
    with Collector(model, loss, owners_of(model), Pass("exact")) as found:
        loss(model(x), y).backward()
    assert found.rows is not None
    assert_close(fisher(found.rows), expected)


def test_hooks_on_a_loss_that_does_not_say_how_it_is_reduced() -> None:
    model, x = architecture("mlp").make(N=4)
    loss = WeightedCrossEntropy(torch.ones(4, dtype=DOUBLE))
    tripled(loss)
    with pytest.raises(UnsupportedModel, match="has hooks, or a forward of its own, that change it"):
        sqrt_fisher(model, loss, x, torch.tensor([0, 1, 2, 0]))


# --- batches without targets that count -------------------------------------------------------------------------------


class Masked(nn.Module):
    """A mean over samples whose target is not negative, as a user would write it."""

    def __init__(self, reduction: str, *, least: int = 0, weighed: bool = False) -> None:
        super().__init__()
        self.reduction, self.least, self.weighed = reduction, least, weighed

    def forward(self, z: Tensor, y: Tensor) -> Tensor:
        counts = y >= 0
        if self.weighed:
            total = (F.cross_entropy(z, y.clamp(min=0), reduction="none") * counts).sum()
        else:
            total = F.cross_entropy(z[counts], y[counts], reduction="sum")
        return total / counts.sum().clamp(min=self.least) if self.reduction == "mean" else total


class Skipping(nn.CrossEntropyLoss):
    """A subclass of a loss that skips targets."""


OWN_MEANS = [
    Masked("mean"),
    Masked("mean", least=1),
    Masked("mean", weighed=True),
    Masked("mean", least=1, weighed=True),
    Skipping(ignore_index=-1),
]


@pytest.mark.parametrize("loss", OWN_MEANS)
def test_a_mean_over_no_targets_has_no_weight(loss: nn.Module) -> None:
    model, x = architecture("mlp").make(N=6)
    none, some = torch.full((3,), -1), torch.tensor([0, -1, 2])
    for kind in ("ggn", "empirical"):
        with pytest.raises(Weightless, match="No target carries weight"):
            sqrt_fisher(model, loss, x[:3], none, kind)
        with pytest.raises(Weightless), Collector(model, loss, owners_of(model), Pass(kind)):
            loss(model(x[:3]), none)
    z, J = outputs(model, x), dense_jacobian(model, x)
    expected = dense_ggn(J, nn.CrossEntropyLoss(ignore_index=-1), z, torch.cat([none, some]))
    batches = [(x[:3], none), (x[3:], some)]
    v = torch.randn(J.shape[1], dtype=DOUBLE)
    for structure in (Full, KFAC):
        alone = structure.fit(model, loss, batches[1:], kind="ggn")
        assert_close(structure.fit(model, loss, batches, kind="ggn").matvec(v), alone.matvec(v))
    assert_close(GGN(model, loss, batches).to_dense(), expected, 1e-9)
    data, S = (x, torch.cat([none, some])), sqrt_fisher(model, loss, x, torch.cat([none, some]), "ggn")
    memory = 16 * -(-bytes_of(S) // 6)
    streamed = curvlab.gram(model, data, loss=loss, kind="ggn", memory=memory)
    assert_close(torch.linalg.eigvalsh(streamed), torch.linalg.eigvalsh(S.gram()), 1e-9)


def test_training_steps_over_no_targets_are_weightless_or_finite() -> None:
    """The step is refused by name, and the next one goes on."""
    model, x = architecture("mlp").make(N=3)
    for kind in ("ggn", "empirical"):
        loss = Masked("mean", least=1)
        preconditioner = Preconditioner(model, loss, "kfac", kind=kind, damping=0.1)  # type: ignore[arg-type]
        for y in (torch.tensor([0, -1, 2]), torch.full((3,), -1), torch.tensor([1, 1, -1])):
            model.zero_grad()
            if not bool((y >= 0).any()):
                with pytest.raises(Weightless), preconditioner.collect():
                    loss(model(x), y).backward()
                continue
            with preconditioner.collect():
                loss(model(x), y).backward()
            preconditioner.precondition()
            assert all(bool(p.grad.isfinite().all()) for p in model.parameters())


def test_a_loss_that_is_flat_where_the_outputs_are_keeps_its_divisor() -> None:
    """All residuals are within the tolerance: the batch has no curvature, but counts when means merge."""

    def tolerant(z: Tensor, y: Tensor) -> Tensor:
        return ((z - y).abs() - 0.5).relu().square().sum(1)

    model, x = architecture("mlp").make(N=4)
    loss, y = PerSample(tolerant), outputs(model, x).clone()
    y[3] += 2.0
    assert loss_terms(loss, outputs(model, x)[:3], y[:3]).count == pytest.approx(3)
    whole = GGN(model, loss, (x, y)).to_dense()
    assert_close(GGN(model, loss, [(x[:3], y[:3]), (x[3:], y[3:])]).to_dense(), whole)
    halves = [sqrt_fisher(model, loss, x[n], y[n], "empirical") for n in (slice(3), slice(3, 4))]
    assert_close(fisher(merge(halves)), fisher(sqrt_fisher(model, loss, x, y, "empirical")))


def test_a_function_with_a_reduction_is_not_altered() -> None:
    def mean(z: Tensor, y: Tensor) -> Tensor:
        return F.mse_loss(z, y)

    mean.reduction = "mean"  # type: ignore[attr-defined]
    model, x = architecture("mlp").make(N=4)
    with pytest.raises(UnsupportedModel, match="attribute reduction of function cannot be set"):
        GGN(model, mean, [(x, torch.zeros(4, 3).double())] * 2)
    assert vars(mean) == {"reduction": "mean"}
