"""Losses made of losses: multiples, and tasks on parts of the outputs."""

from typing import Any

import pytest
import torch
from oracle import DOUBLE, architecture, loss_case
from row_cases import fisher, generator, log_cosh
from torch import Tensor, nn
from torch.nn import functional as F

from curvlab.errors import UnsupportedModel
from curvlab.fisher import Full
from curvlab.nn import GaussianNLL, HalfSquaredError, MultiTask, PerSample, Scaled, Task
from curvlab.rows import merge, sqrt_fisher
from curvlab.spectrum import GGN
from curvlab.testing.oracle import assert_close, dense_ggn, dense_jacobian, outputs


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
    with pytest.raises(ValueError, match="cannot be called 'values', as no module can"):
        MultiTask({"values": Task(half, slice(1))})
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
