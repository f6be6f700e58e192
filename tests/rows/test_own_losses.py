"""Losses whose Hessian is no Fisher matrix, and any loss of the user's own."""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from typing import Any

import pytest
import torch
from oracle import DOUBLE, architecture
from row_cases import fisher, generator, log_cosh
from torch import Tensor, nn
from torch.func import jacrev
from torch.nn import functional as F

import curvlab
from curvlab.errors import NotPositiveDefinite, UnsupportedModel
from curvlab.fisher import EKFAC, Full
from curvlab.nn import HalfSquaredError, PerSample
from curvlab.optim import NaturalGradient
from curvlab.rows import merge, sqrt_fisher
from curvlab.rows.collect import Collector
from curvlab.rows.loss import loss_terms
from curvlab.rows.owners import owners_of
from curvlab.rows.passes import Pass
from curvlab.spectrum import GGN, rank
from curvlab.testing.oracle import assert_close, dense_ggn, dense_jacobian, output_major, outputs

Values = Callable[[Tensor, Tensor], Tensor]


def positive(z: Tensor) -> Tensor:
    return F.softplus(z) + 0.1


def same(z: Tensor) -> Tensor:
    return z


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
    root = loss_terms(case.make("mean"), z, case.targets(z)).root()
    A = root.apply(torch.eye(3, dtype=DOUBLE)[:, None].expand(3, 3, 3)).transpose(0, 1)
    inverse = torch.linalg.pinv(A, rtol=1e-10)
    u = torch.randn(2, 3, 3, dtype=DOUBLE)
    assert_close(root.dual(u), torch.einsum("nck,bcn->bkn", inverse, u))
    assert_close(root.projector(), (A @ inverse).transpose(0, 1))
    assert_close(root.weighed.T * 1.0, (A.abs().sum(2) > 0) * 1.0)


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
        """What reads the root at the output reads this one: ranks, undamped steps, states on disk."""
        model, x = architecture("mlp").make(N=3)
        loss, y = PerSample(matched), torch.ones(3, 3, dtype=DOUBLE)
        rows = sqrt_fisher(model, loss, x, y, "ggn")
        assert rank(rows).attainable == rank(rows).rank == 3
        table = curvlab.compare(model, loss, (x, y), ["full"], damping=[1e-3], kind="ggn", steps=0).table
        assert table["cosine"].item() == pytest.approx(1)
        for structure in (Full(), EKFAC()):
            structure.update(rows)
            copy = type(structure)()
            copy.load_state_dict(structure.state_dict())
            assert torch.equal(copy.to_dense(), structure.to_dense())
            if structure.averages:
                continue
            assert_close(copy.rows.dual(torch.ones(rows.R, dtype=DOUBLE)), rows.dual(torch.ones(rows.R, dtype=DOUBLE)))


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
    optimiser = NaturalGradient(model, loss, lr=1.0, structure="full", kind="ggn", damping=0.1, kl_clip=None)
    before = torch.cat([p.detach().flatten().clone() for p in model.parameters()])
    with optimiser.collect():
        loss(model(x), y).backward()
    g = torch.cat([p.grad.flatten() for p in model.parameters()])
    F_ = fisher(sqrt_fisher(model, loss, x, y, "ggn"))
    optimiser.step()
    after = torch.cat([p.detach().flatten() for p in model.parameters()])
    assert_close(before - after, torch.linalg.solve(F_ + 0.1 * torch.eye(len(g), dtype=DOUBLE), g), 1e-9)
    table = curvlab.compare(model, loss, (x, y), ["full", "diagonal"], damping=[1e-3], kind="ggn", steps=0).table
    assert table["cosine"][0] == pytest.approx(1)


def test_a_function_with_a_reduction_is_not_altered() -> None:
    def mean(z: Tensor, y: Tensor) -> Tensor:
        return F.mse_loss(z, y)

    mean.reduction = "mean"  # type: ignore[attr-defined]
    model, x = architecture("mlp").make(N=4)
    with pytest.raises(UnsupportedModel, match="attribute reduction of function cannot be set"):
        GGN(model, mean, [(x, torch.zeros(4, 3).double())] * 2)
    assert vars(mean) == {"reduction": "mean"}
