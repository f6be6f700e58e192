"""What a preconditioner refuses, and what may be left to the plain gradient instead."""

import pytest
import torch
from preconditioner_cases import RHO, data, network, now, options, reference, run
from torch import Tensor, nn

from curvlab.errors import StateError, UnsupportedModel
from curvlab.fisher import STRUCTURES, Full, make
from curvlab.optim import Preconditioner
from curvlab.testing.oracle import assert_close


def test_a_replaced_module_is_named() -> None:
    pre = Preconditioner(network(), nn.CrossEntropyLoss(), damping=RHO)
    pre.model[4] = nn.Linear(5, 3).double()  # type: ignore[operator]
    with pytest.raises(StateError, match="4 were replaced"):
        run(pre, *data())


def test_sparse_gradients_are_refused_or_plain() -> None:
    model = nn.Sequential(nn.Embedding(7, 4, sparse=True), nn.Flatten(), nn.Linear(8, 3))
    with pytest.raises(UnsupportedModel, match=r"0 has sparse gradients.*plain=\('0',\)"):
        Preconditioner(model, nn.CrossEntropyLoss())
    pre = Preconditioner(model, nn.CrossEntropyLoss(), plain=("0",), damping=RHO)
    run(pre, torch.arange(6).view(3, 2), torch.arange(3))
    pre.precondition()
    assert model[0].weight.grad is not None
    assert model[0].weight.grad.is_sparse


class Shifted(nn.Module):
    """Batch normalisation and a bare parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 3)
        self.shift = nn.Parameter(torch.zeros(6))

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.norm(self.first(x)) + self.shift)


def test_parameters_without_factors_beside_batch_normalisation_are_refused_or_plain() -> None:
    model = Shifted().double()
    with pytest.raises(UnsupportedModel, match=r"norm normalise by the batch, so shift.*plain=\('shift',\)"):
        run(Preconditioner(model, nn.CrossEntropyLoss(), damping=RHO), *data())
    assert model.norm.num_batches_tracked == 0
    pre = Preconditioner(model, nn.CrossEntropyLoss(), damping=RHO, plain=("shift",))
    run(pre, *data())
    pre.precondition()
    assert model.norm.num_batches_tracked == 1


def test_layers_that_cannot_be_called_on_single_samples_can_be_left_plain() -> None:
    class Whole(nn.Module):
        def __init__(self, N: int) -> None:
            super().__init__()
            self.scale, self.N = nn.Parameter(torch.ones(6)), N

        def forward(self, x: Tensor) -> Tensor:
            return x.view(self.N, 6) * self.scale

    torch.manual_seed(0)
    x, y = data()
    model = nn.Sequential(nn.Linear(4, 6), Whole(len(x)), nn.Linear(6, 3)).double()
    with pytest.raises(UnsupportedModel, match=r"1\.scale have no factored rows"):
        run(Preconditioner(model, nn.CrossEntropyLoss()), x, y)
    pre = Preconditioner(model, nn.CrossEntropyLoss(), plain=("1",))
    run(pre, x, y)
    pre.precondition()
    assert now(pre).isfinite().all()


def normalised() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Dropout(0.2), nn.Linear(6, 3)).double()


@pytest.mark.parametrize("key", ["kfac", "ekfac", "diagonal"])
def test_batch_normalisation_in_training_is_allowed_for_moments_and_said(key: str) -> None:
    pre = Preconditioner(normalised(), nn.CrossEntropyLoss(), key, damping=RHO, kl_clip=None)
    assert "batch coupling ignored in 1" in repr(pre)
    gradient = run(pre, *data())
    pre.precondition()
    assert_close(now(pre), reference(pre.structure, gradient), 1e-8)
    pre.model.eval()
    assert "batch coupling" not in repr(pre)


@pytest.mark.parametrize("key", [key for key in STRUCTURES if not STRUCTURES[key].averages])
def test_batch_normalisation_in_training_is_refused_by_structures_of_rows(key: str) -> None:
    pre = Preconditioner(normalised(), nn.CrossEntropyLoss(), make(key, **options(key)), damping=RHO)
    with pytest.raises(UnsupportedModel, match=r"normalisation in 1 is that of the batch.*eval\(\)"):
        run(pre, *data())


@pytest.mark.usefixtures("unchecked_types")
def test_what_goes_wrong_is_named() -> None:
    model, loss, (x, y) = network(), nn.CrossEntropyLoss(), data()
    pre = Preconditioner(model, loss)
    loss(model(x), y).backward()
    with pytest.raises(StateError, match=r"nothing was collected.*collect\(\)"):
        pre.precondition()
    model[2].bias.requires_grad_(False)
    with pytest.raises(StateError, match=r"frozen or unfrozen: 2\.bias"):
        run(pre, x, y)
    with pytest.raises(UnsupportedModel, match="L1Loss has no rows"):
        Preconditioner(model, nn.L1Loss())
    with pytest.raises(ValueError, match=r"'kfca'.*kfac"):
        Preconditioner(model, loss, "kfca")
    with pytest.raises(ValueError, match=r"'mcc'.*mc"):
        Preconditioner(model, loss, kind="mcc")  # type: ignore[arg-type]
    for wrong, message in [
        ({"damping": -1.0}, "damping is a number"),
        ({"damping": float("nan")}, "damping is a number"),
        ({"decay": 1.5}, r"decay is a number in \[0, 1\]"),
        ({"refresh_every": 0}, "refresh_every is a whole number"),
        ({"refresh_every": 1.5}, "refresh_every is a whole number"),
        ({"draws": 0}, "draws is a whole number"),
        ({"patience": 0}, "patience is a whole number"),
    ]:
        with pytest.raises(ValueError, match=message):
            Preconditioner(model, loss, **wrong)  # type: ignore[arg-type]


def test_structures_that_keep_rows_say_why_they_cannot_average() -> None:
    pre = Preconditioner(network(), nn.CrossEntropyLoss(), Full(side="rows"), damping=RHO, decay=0.9)
    run(pre, *data())
    pre.precondition()
    run(pre, *data())
    with pytest.raises(StateError, match="take decay 0 or 1"):
        pre.precondition()
