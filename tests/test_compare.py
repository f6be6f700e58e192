"""Comparisons of structures: responses against dense constructions, real steps against steps taken by hand."""

import random
from math import isnan

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import curvlab
from curvlab.compare.batches import randomness_kept, two_batches
from curvlab.compare.landscape import Landscape
from curvlab.compare.printing import note_lines
from curvlab.compare.trials import RealStep, Trial, largest, repeated
from curvlab.fisher import EKFAC, KFAC, STRUCTURES, BlockDiagonal, Diagonal, Full, make
from curvlab.nn import HalfSquaredError
from curvlab.problems.images import load_images
from curvlab.problems.vision import digits_residual_problem, standardised
from curvlab.rows.passes import Pass


def _model(width: int = 40) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(10, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 3)
    ).double()


X = torch.randn(12, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
Y = torch.randn(12, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
LOSSES = {
    "mse": (nn.MSELoss(), Y),
    "half": (HalfSquaredError(), Y),
    "sum": (nn.MSELoss(reduction="sum"), torch.zeros(12, 3, dtype=torch.float64)),
    "cross-entropy": (nn.CrossEntropyLoss(label_smoothing=0.1), torch.arange(12) % 3),
    "bce": (nn.BCEWithLogitsLoss(), (torch.arange(36) % 2).double().view(12, 3)),
}


@pytest.mark.parametrize("name", LOSSES)
def test_the_full_matrix_is_the_reference(name: str) -> None:
    loss, y = LOSSES[name]
    found = curvlab.compare(_model(), loss, (X, y), ["full", "block-diagonal"], 0.0, steps=0)
    table = found.table.set_index("structure")
    full, blocks = table.loc["full"], table.loc["block-diagonal"]
    assert full["alpha"] == pytest.approx(1, abs=1e-9)
    assert full["anisotropy"] < 1e-9
    assert full["cosine"] == pytest.approx(1, abs=1e-9)
    assert full["cosine"] <= 1
    assert full["eta_linear"] == pytest.approx(2, abs=1e-9)
    assert blocks["alpha"] == pytest.approx(3, abs=1e-8)
    assert blocks["anisotropy"] < 1e-8
    assert blocks["cosine"] < 0.999
    directions = 24 if name == "cross-entropy" else 36
    assert full["rank"] == directions


@pytest.mark.parametrize("structure", STRUCTURES)
def test_every_column_of_the_linearised_model_against_dense_matrices(structure: str) -> None:
    loss, y = LOSSES["half"]
    model = _model(12)
    rho = 1e-3
    row = curvlab.compare(model, loss, (X, y), structure, rho, steps=0).table.iloc[0]
    S = curvlab.sqrt_fisher(model, loss, X, y)
    dense = S.dense()
    F = STRUCTURES[structure]().update(S).to_dense()
    inverse = torch.linalg.inv(F + rho * torch.eye(S.P, dtype=F.dtype))
    response = dense @ inverse @ dense.T
    alpha = float(response.diagonal().mean())
    assert row["alpha"] == pytest.approx(alpha, rel=1e-8)
    deviation = (response - alpha * torch.eye(S.R, dtype=F.dtype)).norm() / (abs(alpha) * S.R**0.5)
    assert row["anisotropy"] == pytest.approx(float(deviation), rel=1e-7)
    top = float(torch.linalg.eigvalsh(response)[-1])
    assert row["lambda_max"] == pytest.approx(top, rel=1e-8)
    assert row["eta_linear"] == pytest.approx(2 / top, rel=1e-8)
    parameters = list(model.parameters())
    gradient = torch.cat([g.flatten() for g in torch.autograd.grad(loss(model(X), y), parameters)])
    exact = torch.linalg.inv(dense.T @ dense + rho * torch.eye(S.P, dtype=F.dtype)) @ gradient
    step = inverse @ gradient
    assert row["cosine"] == pytest.approx(float(step @ exact / (step.norm() * exact.norm())), rel=1e-8)
    assert row["rho_rel"] == pytest.approx(rho / float(torch.linalg.eigvalsh(F)[-1]), rel=1e-8)
    assert row["seconds"] > 0
    assert isnan(row["eta"])


@pytest.mark.parametrize("key", ["full", "kfac"])
def test_real_steps_are_those_that_one_takes_by_hand(key: str) -> None:
    loss, y = LOSSES["cross-entropy"]
    model, rho = _model(12), 1e-2
    second_batch = (X[:8] + 0.1, y[:8])
    found = curvlab.compare(model, loss, [(X[:8], y[:8]), second_batch], key, rho, seconds=None)
    S = curvlab.sqrt_fisher(model, loss, X[:8], y[:8])
    g = torch.cat([p.flatten() for p in torch.autograd.grad(loss(model(X[:8]), y[:8]), list(model.parameters()))])
    d = torch.linalg.solve(make(key).update(S).to_dense() + rho * torch.eye(S.P, dtype=g.dtype), g)
    here = nn.utils.parameters_to_vector(model.parameters()).detach()

    def losses(rate: float) -> tuple[float, float]:
        nn.utils.vector_to_parameters(here - rate * d, model.parameters())
        with torch.no_grad():
            return float(loss(model(X[:8]), y[:8])), float(loss(model(second_batch[0]), y[:8]))

    start, second = losses(0.0)
    for row in found.steps.to_dict("records"):
        eta = row["learning_rate"]
        after, other = losses(eta)
        assert row["fall"] == pytest.approx(start - after, rel=1e-6, abs=1e-12)
        assert row["second_fall"] == pytest.approx(second - other, rel=1e-6, abs=1e-12)
        quadratic = eta * g @ d - eta**2 / 2 * (S.dense() @ d).square().sum()
        assert row["predicted_fall"] == pytest.approx(float(quadratic), rel=1e-6, abs=1e-12)
    row = found.table.iloc[0]
    rates = found.steps["learning_rate"]
    assert rates.max() == pytest.approx(2 * row["eta_linear"])
    assert (rates.iloc[:-1].to_numpy() / rates.iloc[1:].to_numpy() == 2).all()
    one = found.steps.set_index("learning_rate").loc[row["eta"]]
    assert row["fall"] == one["second_fall"]
    assert row["ratio"] == pytest.approx(one["fall"] / one["predicted_fall"])


def test_the_largest_rates_are_those_up_to_which_the_loss_falls() -> None:
    """A rate at which the loss falls by chance, beyond one at which it rises, does not count."""
    losses = [(8.0, 0.5, 3.0), (4.0, 2.0, 3.0), (2.0, float("nan"), 0.5), (1.0, 0.8, 0.7), (0.5, 0.9, 0.8)]
    found = Trial(1.0, 1.0, tuple(RealStep(rate, batch, second, 0.1) for rate, batch, second in losses))
    assert found.eta_batch == 1.0
    assert found.eta_second == 2.0
    assert found.best(8.0).rate == 2.0
    assert found.best(1.0).rate == 1.0
    assert found.best(0.1) is None
    assert largest(lambda rate: rate < 3, [8.0, 4.0, 2.0, 1.0]) == 2.0
    assert largest(lambda rate: False, [8.0, 4.0]) == 0.0


def test_a_row_of_steps_ends_with_the_first_loss_above_its_beginning() -> None:
    """Gradient descent on a quadratic: stable below 2/λ, and with momentum 0.9 on (1 + β) times that."""
    model = nn.Linear(1, 1, bias=False).double()
    nn.init.ones_(model.weight)
    batch = (torch.ones(1, 1, dtype=torch.float64), torch.zeros(1, 1, dtype=torch.float64))
    landscape = Landscape(model, HalfSquaredError(), Pass())
    batches = two_batches([batch], landscape.loss, splits=True, wants_second=True)
    assert batches.second is None

    def gradient(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return landscape.slope(weights, batch).gradient

    first = gradient(landscape.here)
    for rate, momentum, entries in ((1.9, 0.0, 9), (2.1, 0.0, 2), (0.5, 0.9, 9), (2.1, 0.9, 2)):
        losses = repeated(landscape, batches, first, gradient, rate, 8, momentum)
        assert len(losses) == entries
        w, v, expected = 1.0, 0.0, [0.5]
        for _ in range(entries - 1):
            v = momentum * v + w
            w -= rate * v
            expected.append(w**2 / 2)
        assert losses == pytest.approx(expected)


def _convolutional(side: int) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(16 * (side // 4) ** 2, 10),
    )  # fmt: skip


def _by_hand(model: nn.Module, data: tuple[torch.Tensor, torch.Tensor], damping: float, rate: float) -> list[float]:
    """Losses of steps in a row with exact K-FAC, fitted anew before each."""
    loss, (x, y) = nn.CrossEntropyLoss(), data
    losses = []
    for step in range(5):
        value = loss(model(x), y)
        losses.append(float(value.detach()))
        if step == 4 or not np.isfinite(losses[-1]):
            return losses
        names = [name for name, _ in model.named_parameters()]
        gradient = dict(zip(names, torch.autograd.grad(value, list(model.parameters())), strict=True))
        kfac = KFAC().update(curvlab.sqrt_fisher(model, loss, x, y))
        with torch.no_grad():
            for name, d in kfac.solve(gradient, damping).items():
                model.get_parameter(name).sub_(rate * d)
    return losses


@pytest.mark.parametrize(
    ("images", "N", "damping", "share"), [("digits", 64, 3e-3, 0.9), ("fashion-mnist", 128, 6e-3, 0.5)]
)
def test_the_rate_of_the_linearised_model_diverges_in_four_steps_and_the_one_that_is_advised_does_not(
    images: str, N: int, damping: float, share: float
) -> None:
    """A share of the linear rate, whose first step does lower the loss, ends far above the beginning."""
    try:
        source = load_images(images)
    except Exception as error:
        pytest.skip(str(error))
    x = torch.from_numpy(standardised(source.train_images[:256], source.train_images[:256])).float()
    y = torch.from_numpy(source.train_labels[:256].copy()).long()
    data = [(x[:N], y[:N]), (x[N : 2 * N], y[N : 2 * N])]
    row = curvlab.compare(
        _convolutional(x.shape[-1]), nn.CrossEntropyLoss(), data, "kfac", damping, seconds=None
    ).best()
    linear = _by_hand(_convolutional(x.shape[-1]), data[0], damping, share * row["eta_linear"])
    assert linear[1] < linear[0]
    assert not linear[-1] < 2 * linear[0]
    for rate in (row["eta_repeated"], row["eta"]):
        advised = _by_hand(_convolutional(x.shape[-1]), data[0], damping, rate)
        assert advised[-1] < advised[0]
        assert max(advised) == advised[0]
    assert row["fall"] > 0


def test_rates_that_hold_for_steps_in_a_row_are_those_found_by_hand() -> None:
    """Four steps with the diagonal fitted anew, and ten with it left as it is, without momentum and with 0.9."""
    loss, y = LOSSES["cross-entropy"]
    torch.manual_seed(0)
    model, rho = nn.Linear(10, 3).double(), 1e-2
    row = curvlab.compare(model, loss, [(X, y), (X + 0.1, y)], "diagonal", rho, seconds=None).table.iloc[0]
    here = nn.utils.parameters_to_vector(model.parameters()).detach()

    def holds(rate: float, steps: int, beta: float = 0.0, *, refit: bool = False) -> bool:
        theta, v, diagonal, losses = here, torch.zeros_like(here), None, []
        for _ in range(steps + 1):
            nn.utils.vector_to_parameters(theta, model.parameters())
            value = loss(model(X), y)
            losses.append(float(value.detach()))
            g = torch.cat([p.flatten() for p in torch.autograd.grad(value, list(model.parameters()))])
            if diagonal is None or refit:
                diagonal = curvlab.sqrt_fisher(model, loss, X, y).dense().square().sum(0)
            v = beta * v + g / (diagonal + rho)
            theta = theta - rate * v
        return max(losses) == losses[0] and losses[-1] < losses[0]

    def first(top: float, *arguments: float, refit: bool = False) -> float:
        return next(top / 2**k for k in range(8) if holds(top / 2**k, *arguments, refit=refit))

    assert row["eta_repeated"] == first(row["eta_batch"], 4, refit=True)
    plain = first(row["eta_batch"], 10)
    assert row["momentum"] == first(2 * plain, 10, 0.9) / plain


def test_relative_damping_is_recorded_both_ways() -> None:
    loss, y = LOSSES["mse"]
    table = curvlab.compare(
        _model(), loss, (X, y), structures=["full", "diagonal"], damping=["rel:1e-2"], steps=0
    ).table
    assert table["damping"].tolist() == ["rel:1e-2"] * 2
    assert table["rho_rel"].tolist() == pytest.approx([1e-2, 1e-2])
    assert table["rho"].nunique() == 2


def test_structures_of_the_user_and_other_kinds() -> None:
    loss, y = LOSSES["cross-entropy"]
    halves = BlockDiagonal(partition=[["0.weight", "0.bias", "2.weight"], ["2.bias", "4.weight", "4.bias"]])
    generator = torch.Generator().manual_seed(0)
    structures = {"two blocks": halves, "exact": Full()}
    table = curvlab.compare(_model(), loss, (X, y), structures, kind="mc", generator=generator).table
    assert table["structure"].unique().tolist() == ["two blocks", "exact"]
    assert (table.loc[table["structure"] == "exact", "anisotropy"] > 1e-3).all(), (
        "rows of one draw are not the exact ones"
    )
    assert not halves.updated, "structures of the user stay as they are"


@pytest.mark.parametrize("given", ["kfac", KFAC(), ["kfac"], [KFAC()], {"kfac": KFAC()}])
def test_one_structure_and_one_damping_need_no_list(given: object) -> None:
    loss, y = LOSSES["mse"]
    table = curvlab.compare(_model(4), loss, (X, y), given, 1.0, steps=0).table
    assert table[["structure", "damping"]].to_numpy().tolist() == [["kfac", 1.0]]


def test_all_structures_that_there_are_by_then_are_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that a user has registered since curvlab was imported, too."""
    loss, y = LOSSES["mse"]
    monkeypatch.setitem(STRUCTURES._things, "mine", Diagonal)
    table = curvlab.compare(_model(4), loss, (X, y), damping=[1.0], steps=0).table
    assert table["structure"].tolist() == [*STRUCTURES]
    assert "mine" in [*STRUCTURES]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"structures": ["blockdiagonal"]}, "Did you mean 'block-diagonal'"),
        ({"structures": [3]}, "structures holds 3: 3, which is no structure"),
        ({"structures": {"mine": "kfac"}}, "structures holds 'mine': 'kfac', which is no structure"),
        ({"structures": []}, "structures is empty"),
        ({"damping": []}, "damping is empty"),
        ({"damping": ["1e-3"]}, 'damping is a number or a string such as "rel:1e-6"'),
        ({"data": X}, "data is a pair .* got a Tensor"),
        ({"data": []}, "The data hold no batch"),
        ({"data": [{"x": X}]}, "A batch is a pair .* got a dict"),
        ({"steps": 2.5}, "steps is a whole number"),
        ({"seconds": 0}, "seconds is a number above 0"),
        ({"memory": "much"}, "memory is a number of bytes or text"),
    ],
)
def test_wrong_arguments_are_refused_with_what_is_wanted(
    arguments: dict[str, object], message: str, unchecked_types: None
) -> None:
    loss, y = LOSSES["mse"]
    with pytest.raises(ValueError, match=message):
        curvlab.compare(_model(4), loss, **{"data": (X, y)} | arguments)


def test_a_fisher_matrix_of_zero_is_refused() -> None:
    model = nn.Linear(10, 1).double()
    with pytest.raises(ValueError, match=r"The exact Fisher matrix of Linear and CrossEntropyLoss .* is zero"):
        curvlab.compare(model, nn.CrossEntropyLoss(), (X, torch.zeros(12, dtype=torch.long)), ["full", "kfac"])


def test_a_structure_of_rows_of_zero_is_named() -> None:
    model = _model()
    with pytest.raises(ValueError, match=r"The structure 'kfac' of rows of kind 'empirical' is zero"):
        curvlab.compare(model, nn.MSELoss(), (X, model(X).detach()), ["kfac"], kind="empirical", steps=0)


def _loader(generator: torch.Generator | None) -> DataLoader:
    return DataLoader(TensorDataset(X.repeat(3, 1), torch.arange(36)), batch_size=8, shuffle=True, generator=generator)


@pytest.mark.parametrize("own", [True, False])
def test_model_random_states_and_the_order_of_the_data_stay_as_they_were(own: bool) -> None:
    model = nn.Sequential(nn.Linear(10, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 36)).double()
    model(X)
    model.eval()
    model[0].bias.grad = torch.ones(6, dtype=torch.float64)
    model[3].bias.requires_grad_(False)
    objects = dict([*model.named_parameters(), *model.named_buffers()])
    before = {name: value.detach().clone() for name, value in objects.items()}
    modes = [module.training for module in model.modules()]

    def seeded() -> DataLoader:
        torch.manual_seed(3)
        np.random.seed(3)  # noqa: NPY002
        return _loader(torch.Generator().manual_seed(5) if own else None)

    batches = [y.tolist() for _, y in seeded()]
    drawn = (torch.rand(2).tolist(), np.random.rand())  # noqa: NPY002
    loader = seeded()
    curvlab.compare(model, nn.CrossEntropyLoss(), loader, ["full", "kfac"], "rel:1e-2")
    assert [y.tolist() for _, y in loader] == batches
    assert (torch.rand(2).tolist(), np.random.rand()) == drawn  # noqa: NPY002
    for name, value in [*model.named_parameters(), *model.named_buffers()]:
        assert value is objects[name]
        assert torch.equal(value, before[name])
    assert torch.equal(model[0].bias.grad, torch.ones(6, dtype=torch.float64))
    assert all(p.grad is None for name, p in model.named_parameters() if name != "0.bias")
    assert [module.training for module in model.modules()] == modes
    assert not any(module._forward_hooks or module._backward_hooks for module in model.modules())


def test_what_a_data_set_draws_from_gets_its_state_back() -> None:
    random.seed(1)
    state = random.getstate()
    with randomness_kept(_loader(None)):
        random.random()
    found = random.getstate()
    assert found == state


def test_the_second_batch_is_the_loaders_or_the_last_half_of_a_pair() -> None:
    loss, y = nn.CrossEntropyLoss(), torch.arange(12) % 3
    model = _model(6)
    halves = curvlab.compare(model, loss, (X, y), "full", 1e-2)
    listed = curvlab.compare(model, loss, [(X[:6], y[:6]), (X[6:], y[6:])], "full", 1e-2)
    pd.testing.assert_frame_equal(halves.table.drop(columns="seconds"), listed.table.drop(columns="seconds"))
    assert "the last 6 of the 12 samples, held out" in halves.about
    assert "the second of the data" in listed.about
    alone = curvlab.compare(model, loss, (X[:1], y[:1]), "full", 1e-2)
    assert "the data are one batch that cannot be halved" in alone.about
    assert alone.table["eta_second"].isna().all()
    assert alone.best()["fall"] > 0, "of the batch itself"


def test_a_residual_network_with_batch_normalisation_answers_soon_with_all_defaults() -> None:
    """Structures that would take minutes are left out by name, and whatever there is no time for is named, too."""
    problem = digits_residual_problem(width=40, dtype=torch.float32)
    (x, y), model = problem.train, problem.model.eval()
    found = curvlab.compare(model, problem.loss, (x[:32], y[:32]), seconds=6)
    table = found.table.set_index("structure")
    assert sum(p.numel() for p in model.parameters()) > 100_000
    for name in ("layer-wise", "block-tridiagonal", "unit-wise", "component-wise"):
        assert table.loc[name, "note"].str.contains("costly at this size").all()
    assert table["note"][table["eta_linear"].isna()].str.startswith("not measured").all()
    assert table["eta_linear"].notna().any()


def test_what_there_is_no_time_for_is_named() -> None:
    loss, y = LOSSES["cross-entropy"]
    found = curvlab.compare(_model(4), loss, (X, y), ["full", "kfac"], seconds=1e-9)
    assert found.table["note"].eq("not measured: no time was left of the 0.0 s").all()
    assert "full, kfac: not measured: no time was left of the 0.0 s." in found.text(80)
    with pytest.raises(ValueError, match="no learning rate was seen to hold for steps in a row"):
        found.best()
    assert len(found.plot().axes) == 2


def test_what_does_not_fit_is_left_out_by_name_or_refused() -> None:
    loss, y = LOSSES["half"]
    model = _model(60)
    structures = {"whole": Full(side="parameters"), "kfac": KFAC()}
    table = curvlab.compare(model, loss, (X, y), structures, 1.0, memory="4MiB", steps=0).table.set_index("structure")
    left_out, kept = table.loc["whole"], table.loc["kfac"]
    assert left_out["note"].startswith("not measured: its matrices and their factorisation need 309.4 MiB, 3.")
    assert isnan(left_out["alpha"])
    assert kept["alpha"] > 0
    with pytest.raises(MemoryError, match=r"R = 18 rows, .* 1.0 KiB are allowed"):
        curvlab.compare(model, loss, (X, y), memory=1024)


def test_memory_is_that_of_the_state_in_training() -> None:
    """Factors of K-FAC, a number a parameter of the diagonal, rows and nothing else of the full matrix on their side."""
    loss, y = LOSSES["half"]
    model = _model(40)
    structures = ["full", "diagonal", "kfac", "ekfac"]
    table = curvlab.compare(model, loss, (X, y), structures, 1.0, steps=0).table.set_index("structure")
    P = sum(p.numel() for p in model.parameters())
    factors = 11**2 + 40**2 + 41**2 + 40**2 + 41**2 + 3**2
    rows = curvlab.sqrt_fisher(model, loss, X, y)
    numbers = table["mib"] * 2**20 / 8
    assert numbers["diagonal"] == pytest.approx(P, rel=0.01)
    assert numbers["kfac"] == pytest.approx(factors, rel=0.01)
    assert factors <= numbers["ekfac"] <= factors + 2 * P
    assert numbers["full"] == pytest.approx(sum(f.numel() for layer in rows.layers for f in layer.factors), rel=0.01)
    assert (table["peak_mib"] > 0).all()
    assert table.loc["kfac", "peak_mib"] > table.loc["diagonal", "mib"]


def test_a_row_of_a_graph_has_no_second_batch_of_its_own() -> None:
    model = nn.Linear(4, 3).double()
    x, y = torch.randn(5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 2, 1])
    found = curvlab.compare(model, nn.CrossEntropyLoss(), (x, y), "full", 1e-2, nodes=torch.tensor([1, 3, 4]))
    assert found.table["eta_second"].isna().all()
    assert found.best()["eta"] > 0


@pytest.fixture(scope="module")
def comparison() -> curvlab.Comparison:
    loss, y = LOSSES["cross-entropy"]
    structures = {"kfac": KFAC(), "a longer name": EKFAC()}
    return curvlab.compare(_model(8), loss, [(X, y), (X + 0.1, y)], structures, [1e-2, "rel:1e-1"])


@pytest.mark.parametrize("width", [20, 40, 80, 120, 300])
def test_every_number_is_printed_at_any_width(comparison: curvlab.Comparison, width: int) -> None:
    text = comparison.text(width)
    assert all(name in text for name in comparison.table if name not in ("structure", "damping", "note"))
    assert max(map(len, text.splitlines())) <= max(width, 30)
    first = text.split("\n\n")[2].splitlines()[0]
    if width >= 80:
        assert all(name in first for name in ("structure", "damping", "eta", "fall", "eta_repeated", "eta_second"))
    best = comparison.best()
    assert f"{best['structure']} at damping {best['damping']}" in " ".join(text.split())


def test_a_note_that_names_several_things_stays_in_one_piece() -> None:
    """Whatever punctuation it has; structures that share it stand before it."""
    long = "not measured: it needs 2 GiB; 1 GiB are left."
    records = [
        {"structure": name, "damping": rho, "notes": notes}
        for name, rho, notes in (
            ("full", 0.1, (long,)),
            ("full", 1.0, (long, "late")),
            ("kfac", 0.1, ()),
            ("kfac", 1.0, ("late",)),
        )
    ]
    assert note_lines(records) == [
        "full: not measured: it needs 2 GiB; 1 GiB are left.",
        "full at 1.0, kfac at 1.0: late.",
    ]


def test_print_shows_the_table_and_the_repr_is_one_line(comparison: curvlab.Comparison, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "90")
    assert str(comparison) == comparison.text(90)
    assert "\n" not in repr(comparison)
    html = comparison._repr_html_()
    assert html.count("<tr") == 5
    assert "a longer name" in html
    assert isinstance(comparison.table, pd.DataFrame)
    assert comparison.best()["fall"] == comparison.table["fall"].max()


def test_figures_show_every_candidate(comparison: curvlab.Comparison) -> None:
    left, right = comparison.plot().axes
    assert [label.get_text() for label in right.get_yticklabels()] == [
        "kfac, 0.01" if name == "kfac" and rho == 1e-2 else f"{name}, {rho}"
        for name, rho in zip(["K-FAC"] * 2 + ["a longer name"] * 2, comparison.table["damping"], strict=True)
    ]
    assert len(left.lines) == 5, "a line a candidate, and one at zero"
    loss, y = LOSSES["half"]
    scale, anisotropy = curvlab.compare(_model(4), loss, (X, y), ["full", "kfac"], 1.0, steps=0).plot().axes
    assert len(scale.lines) == len(anisotropy.lines) == 2


def test_progress_says_what_there_is_to_do(capsys: pytest.CaptureFixture[str]) -> None:
    loss, y = LOSSES["cross-entropy"]
    curvlab.compare(_model(4), loss, (X, y), ["full", "kfac"], [1e-2], progress=True)
    shown = capsys.readouterr().err
    assert "Comparing 2 candidates (2 structures × 1 dampings): P = 79, R = 18 rows" in shown
    assert "response measured" in shown
    assert "momentum" in shown
