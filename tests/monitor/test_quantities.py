"""Each quantity is what a dense computation gives, in float64."""

import pytest
import torch
from torch import nn

import curvlab
from curvlab.errors import UnsupportedModel
from curvlab.fisher import EKFAC, KFAC, Diagonal, Full
from curvlab.monitor import Alignment, Anisotropy, Edge, EffectiveRank, Eigenvalues, Layers, Noise, Trace, Training
from curvlab.monitor.stepping import Whitened
from curvlab.optim import NaturalGradient, Preconditioner


@pytest.fixture
def run():
    """A network, its loss, and a batch."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    loss = nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 0.5]).double())
    return model, loss, torch.randn(12, 5).double(), torch.randint(3, (12,))


def dense_hessian(model, loss, x, y):
    names = list(dict(model.named_parameters()))
    shapes = [p.shape for p in model.parameters()]

    def of_flat(flat):
        parts = flat.split([s.numel() for s in shapes])
        state = {n: part.view(s) for n, part, s in zip(names, parts, shapes, strict=True)}
        return loss(torch.func.functional_call(model, state, (x,)), y)

    flat = torch.cat([p.detach().flatten() for p in model.parameters()])
    return torch.autograd.functional.hessian(of_flat, flat)


def stepped(run, optimizer, preconditioner=None, steps=3):
    """The run after some steps of an optimiser."""
    model, loss, x, y = run
    collecting = preconditioner or (optimizer if isinstance(optimizer, NaturalGradient) else None)
    training = Training(model, loss, optimizer, preconditioner, inputs=x, targets=y)
    for _ in range(steps):
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        optimizer.zero_grad()
        if collecting is None:
            loss(model(x), y).backward()
        else:
            with collecting.collect():
                loss(model(x), y).backward()
        if preconditioner is not None:
            preconditioner.precondition()
        optimizer.step()
        training.change = {n: p.detach() - before[n] for n, p in model.named_parameters()}
        training.step += 1
    return training


def converged(quantity, training):
    for _ in range(30):
        values = quantity.measure(training)
    return values


def test_eigenvalues_converge_to_those_of_the_dense_hessian_with_few_products_a_time(run):
    training = Training(run[0], run[1], inputs=run[2], targets=run[3])
    wanted = torch.linalg.eigvalsh(dense_hessian(*run)).flip(0)
    first, values = Eigenvalues().measure(training), converged(Eigenvalues(k=2, tolerance=1e-9), training)
    assert first["sharpness"] < wanted[0]
    assert values["sharpness"] == pytest.approx(float(wanted[0]), rel=1e-6)
    assert values["eigenvalue_2"] == pytest.approx(float(wanted[1]), rel=1e-3)
    assert values["residual"] < 1e-3


def optimisers(model, loss):
    halves = [{"params": model[0].parameters(), "lr": 0.05}, {"params": model[2].parameters(), "lr": 0.2}]
    return {
        "gd": (torch.optim.SGD(model.parameters(), lr=0.1), 2 / 0.1),
        "heavy ball": (torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.5), 3 / 0.1),
        "dampened": (torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.5, dampening=0.5), 3 / 0.05),
        "nesterov": (torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.5, nesterov=True), 3 / (0.1 * 2)),
        "decay": (torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.5), 2 / 0.1),
        "groups": (torch.optim.SGD(halves, lr=0.1), 2 / 0.2),
        "adam": (torch.optim.Adam(model.parameters(), lr=0.01), 38 / 0.01),
        "adamw": (torch.optim.AdamW(halves, betas=(0.5, 0.9)), 6 / 0.2),
    }


@pytest.mark.parametrize("name", ["gd", "heavy ball", "dampened", "nesterov", "decay", "groups", "adam", "adamw"])
def test_preconditioned_sharpness_and_edge_are_those_of_the_optimiser(run, name):
    model = run[0]
    optimizer, edge = optimisers(model, run[1])[name]
    training = stepped(run, optimizer)
    sizes = [p.numel() for p in model.parameters()]
    P = torch.ones(sum(sizes)).double()
    if "adam" in name:
        beta = optimizer.param_groups[0]["betas"][1]
        moments = [optimizer.state[p]["exp_avg_sq"] / (1 - beta**3) for p in model.parameters()]
        P = torch.cat([v.sqrt().flatten() + 1e-8 for v in moments])
    if name in ("groups", "adamw"):
        P[: sizes[0] + sizes[1]] *= 0.2 / 0.05
    H = dense_hessian(*run) + (0.5 * torch.eye(len(P)).double() if name == "decay" else 0)
    wanted = float(torch.linalg.eigvals(H / P[:, None]).real.max())
    values = converged(Edge(tolerance=1e-9), training)
    assert values["edge"] == pytest.approx(edge)
    assert values["sharpness"] == pytest.approx(wanted, rel=1e-6)
    assert values["ratio"] == pytest.approx(wanted / edge, rel=1e-6)


@pytest.mark.parametrize("structure", [Full(), Diagonal(), KFAC(), KFAC(factored_damping=True), EKFAC()], ids=repr)
def test_preconditioned_sharpness_of_natural_gradient_is_that_of_its_own_solve(run, structure):
    model, loss, _, _ = run
    optimizer = NaturalGradient(model, loss, lr=0.1, momentum=0.5, structure=structure, kind="empirical", damping=0.1)
    training = stepped(run, optimizer)
    H = dense_hessian(*run)
    inverse = optimizer.preconditioner.structure.solve(torch.eye(len(H)).double(), 0.1)
    wanted = float(torch.linalg.eigvals(inverse @ H).real.max())
    quantity = Edge(tolerance=1e-9)
    values = converged(quantity, training)
    assert values["edge"] == pytest.approx(3 / 0.1)
    assert values["sharpness"] == pytest.approx(wanted, rel=1e-6)
    names = {condition.name: condition for condition in quantity.conditions(values)}
    assert names["damping too small"].level == pytest.approx(wanted / 2, rel=1e-6)


def test_sgd_behind_a_preconditioner_sees_the_preconditioned_layers(run):
    model, loss, _, _ = run
    natural = Preconditioner(model, loss, Full(), kind="empirical", damping=0.1, plain=("0",))
    training = stepped(run, torch.optim.SGD(model.parameters(), lr=0.1), natural)
    own = slice(-(6 * 3 + 3), None)
    H = dense_hessian(*run)[own, own]
    inverse = natural.structure.solve(torch.eye(len(H)).double(), 0.1)
    values = converged(Edge(tolerance=1e-9), training)
    assert values["sharpness"] == pytest.approx(float(torch.linalg.eigvals(inverse @ H).real.max()), rel=1e-6)


def test_whitened_operator_is_symmetric_with_the_eigenvalues_of_the_pencil(run):
    training = stepped(run, torch.optim.Adam(run[0].parameters(), lr=0.01))
    dense = Whitened(training.hessian(), training.stepping()).to_dense()
    torch.testing.assert_close(dense, dense.T)


class Unknown(torch.optim.Optimizer):
    """An optimiser whose steps nobody knows."""

    def __init__(self, params):
        super().__init__(params, {"lr": 0.1})

    def step(self, closure=None):
        """Do nothing."""


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda m: None, "was given no optimiser"),
        (lambda m: Unknown(m.parameters()), "not known how Unknown makes steps"),
        (lambda m: torch.optim.SGD(m[0].parameters(), lr=0.1), "does not move 2.bias, 2.weight"),
        (lambda m: torch.optim.SGD(m.parameters(), lr=0.1, maximize=True), "maximises"),
        (
            lambda m: torch.optim.SGD(
                [{"params": m[0].parameters(), "momentum": 0.5}, {"params": m[2].parameters()}], lr=1
            ),
            "differ in momentum",
        ),
        (
            lambda m: torch.optim.SGD([{"params": m[0].parameters(), "lr": 0.0}, {"params": m[2].parameters()}], lr=1),
            "learning rate 0",
        ),
        (lambda m: NaturalGradient(m, nn.CrossEntropyLoss(), "quadratic"), "there is no edge"),
    ],
)
def test_steps_without_one_edge_are_refused_with_the_reason(run, make, reason):
    with pytest.raises(UnsupportedModel, match=reason):
        Training(run[0], run[1], make(run[0]), inputs=run[2], targets=run[3]).stepping()


def test_learning_rate_zero_has_no_edge(run):
    training = stepped(run, torch.optim.SGD(run[0].parameters(), lr=0.0), steps=1)
    assert Edge().measure(training)["ratio"] == 0.0


def test_trace_lies_within_its_error_of_the_dense_one_and_draws_anew(run):
    training = Training(run[0], run[1], inputs=run[2], targets=run[3])
    quantity = Trace(products=16)
    first, second = quantity.measure(training), quantity.measure(training)
    wanted = float(dense_hessian(*run).trace())
    assert abs(first["value"] - wanted) < 5 * first["standard_error"]
    assert first["value"] != second["value"]


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("weighted", [True, False])
def test_noise_scale_is_that_of_a_loop_over_samples(run, reduction, weighted):
    model, loss, x, y = run
    loss = nn.CrossEntropyLoss(weight=loss.weight if weighted else None, reduction=reduction)
    total = nn.CrossEntropyLoss(weight=loss.weight, reduction="sum")
    N, count = len(x), 1.0
    if reduction == "mean":
        count = float(loss.weight[y].sum()) if weighted else float(N)
    each = []
    for n in range(N):
        g = torch.autograd.grad(total(model(x[n : n + 1]), y[n : n + 1]), list(model.parameters()))
        each.append(N / count * torch.cat([part.flatten() for part in g]))
    g = torch.stack(each)
    noise = float((g - g.mean(0)).square().sum() / (N - 1))
    signal = float(g.mean(0).square().sum()) - noise / N
    values = Noise().measure(Training(model, loss, inputs=x, targets=y))
    assert values["trace"] == pytest.approx(noise)
    assert values["gradient_square"] == pytest.approx(signal)
    assert values.get("scale", noise / signal) == pytest.approx(noise / signal)
    assert ("scale" in values) == (signal > 0)


def test_noise_needs_more_than_one_sample(run):
    with pytest.raises(UnsupportedModel, match="batch has 1"):
        Noise().measure(Training(run[0], run[1], inputs=run[2][:1], targets=run[3][:1]))


def test_effective_rank_is_the_exponential_of_the_entropy_of_eigenvalues(run):
    model, loss, x, y = run
    S = curvlab.sqrt_fisher(model, loss, x[:4], y[:4]).dense()
    p = torch.linalg.svdvals(S) ** 2
    p = (p / p.sum())[p > 1e-14 * p.sum()]
    values = EffectiveRank(samples=4).measure(Training(model, loss, inputs=x, targets=y))
    assert values == {"effective": pytest.approx(float((-(p * p.log()).sum()).exp())), "rows": 12.0}


def test_anisotropy_is_that_of_compare(run):
    model, loss, x, y = run
    optimizer = NaturalGradient(model, loss, lr=0.0, structure="diagonal", kind="exact", damping=0.01)
    training = stepped(run, optimizer, steps=1)
    row = curvlab.compare(model, loss, (x, y), ["diagonal"], damping=[0.01], steps=0).table.iloc[0]
    values = Anisotropy(samples=12).measure(training)
    assert values["alpha"] == pytest.approx(row["alpha"])
    assert values["anisotropy"] == pytest.approx(row["anisotropy"])


@pytest.mark.parametrize("adam", [True, False])
def test_anisotropy_of_first_order_steps_is_that_of_their_dense_response(run, adam):
    model, loss, x, y = run
    optimizer = (torch.optim.Adam if adam else torch.optim.SGD)(model.parameters(), lr=0.01)
    training = stepped(run, optimizer)
    P = training.stepping().preconditioner.diagonal if adam else torch.ones(57).double()
    rows = curvlab.sqrt_fisher(model, loss, x, y)
    M = rows.dense() / P @ rows.dense().T
    within = rows.root.projector()
    Q = torch.zeros(3, 12, 3, 12).double()
    Q[:, range(12), :, range(12)] = within.transpose(0, 1)
    Q = Q.view(36, 36)
    alpha = M.trace() / Q.trace()
    values = Anisotropy(samples=12).measure(training)
    assert values["alpha"] == pytest.approx(float(alpha))
    assert values["anisotropy"] == pytest.approx(float((M - alpha * Q).norm() / (alpha * Q).norm()))


def test_too_many_rows_are_refused_with_a_remedy(run):
    model = nn.Linear(2, 300)
    with pytest.raises(UnsupportedModel, match=r"Use fewer samples: EffectiveRank\(samples=1\)"):
        EffectiveRank().measure(Training(model, nn.MSELoss(), inputs=torch.randn(9, 2), targets=torch.randn(9, 300)))


def test_a_step_of_gradient_descent_is_aligned_and_one_of_natural_gradient_is_not(run):
    model, loss, x, y = run
    plain = Alignment().measure(stepped(run, torch.optim.SGD(model.parameters(), lr=0.1)))
    assert plain["cosine"] == pytest.approx(1.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    natural = Preconditioner(model, loss, Full(), kind="empirical", damping=1e-2)
    training = stepped(run, optimizer, natural)
    back = {n: p.detach() - training.change[n] for n, p in model.named_parameters()}
    leaves = {n: p.requires_grad_() for n, p in back.items()}
    g = torch.autograd.grad(loss(torch.func.functional_call(model, leaves, (x,)), y), list(leaves.values()))
    g, step = (torch.cat([p.flatten() for p in parts]) for parts in (g, training.change.values()))
    values = Alignment().measure(training)
    assert values["cosine"] == pytest.approx(float(-g @ step / (g.norm() * step.norm())))
    assert values["cosine"] < 0.9
    assert values["step_norm"] == pytest.approx(float(step.norm()))


def test_norms_and_dead_units_are_told_by_layer():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Embedding(9, 4), nn.Flatten(), nn.Linear(8, 4), nn.ReLU(), nn.LayerNorm(4), nn.Linear(4, 2)
    )
    with torch.no_grad():
        model[2].bias[:3] = -100.0
    x, y = torch.randint(5, (16, 2)), torch.randint(2, (16,))
    nn.CrossEntropyLoss()(model(x), y).backward()
    values = Layers().measure(Training(model, nn.CrossEntropyLoss(), inputs=x, targets=y))
    assert values["2/dead"] == 0.75
    assert values["5/dead"] == 0.0
    assert {"0/dead", "4/dead"}.isdisjoint(values)
    norms = [p.detach().norm() for p in model[2].parameters()]
    assert values["2/weight_norm"] == pytest.approx(float(torch.stack(norms).norm()))
    assert values["0/gradient_norm"] == pytest.approx(float(model[0].weight.grad.norm()))


def test_a_layer_is_dead_if_all_its_units_are_in_two_measurements():
    quantity = Layers()
    assert [c.level for c in quantity.conditions({"a/dead": 1.0, "a/weight_norm": 3.0})] == [0.0]
    assert [c.level for c in quantity.conditions({"a/dead": 1.0})] == [1.0]
    assert [c.level for c in quantity.conditions({"a/dead": 0.5})] == [0.5]


def test_sharpening_is_a_rise_of_the_median_above_the_lowest():
    quantity = Eigenvalues()

    def level(sharpness, residual=0.0):
        found = list(quantity.conditions({"sharpness": sharpness, "residual": residual}))
        return found[0].level if found else None

    assert [level(s) for s in (4.0, 2.0)] == [None, None]
    assert level(2.0) == pytest.approx(1 / 1.5)
    assert level(40.0) == pytest.approx(1 / 1.5)  # one batch alone
    assert level(50.0, residual=0.5) is None  # not converged
    assert level(6.0) == pytest.approx(6 / (1.5 * 2))


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: Eigenvalues(k=5, products=4), "5 eigenvalues need as many products"),
        (lambda: Edge(margin=1.0), "margin is a share"),
        (lambda: Trace(products=2), "at least 4"),
        (lambda: Anisotropy(samples=0), "at least 1"),
    ],
)
def test_options_out_of_range_are_refused(make, reason):
    with pytest.raises(ValueError, match=reason):
        make()
