"""Which batches a comparison looks at; model, data and random states stay as they were."""

import random

import numpy as np
import pandas as pd
import pytest
import torch
from comparison_cases import X, small_model
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import curvlab
from curvlab.compare.batches import randomness_kept


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
    model = small_model(6)
    halves = curvlab.compare(model, loss, (X, y), "full", 1e-2)
    listed = curvlab.compare(model, loss, [(X[:6], y[:6]), (X[6:], y[6:])], "full", 1e-2)
    pd.testing.assert_frame_equal(halves.table.drop(columns="seconds"), listed.table.drop(columns="seconds"))
    assert "the last 6 of the 12 samples, held out" in halves.about
    assert "the second of the data" in listed.about
    alone = curvlab.compare(model, loss, (X[:1], y[:1]), "full", 1e-2)
    assert "the data are one batch that cannot be halved" in alone.about
    assert alone.table["eta_second"].isna().all()
    assert alone.best()["fall"] > 0, "of the batch itself"


def test_a_row_of_a_graph_has_no_second_batch_of_its_own() -> None:
    model = nn.Linear(4, 3).double()
    x, y = torch.randn(5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 2, 1])
    found = curvlab.compare(model, nn.CrossEntropyLoss(), (x, y), "full", 1e-2, nodes=torch.tensor([1, 3, 4]))
    assert found.table["eta_second"].isna().all()
    assert found.best()["eta"] > 0
