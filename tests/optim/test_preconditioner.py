"""The preconditioner's direction against the structure's own solve, whichever route it takes."""

import copy
import gc
import weakref
from collections.abc import Callable
from contextlib import ExitStack
from itertools import pairwise
from typing import Any

import pytest
import torch
from oracle import DOUBLE
from torch import Tensor, nn

from curvlab import sqrt_fisher
from curvlab.errors import StateError, UnsupportedModel
from curvlab.fisher import KFAC, STRUCTURES, Full, Structure, make
from curvlab.fisher.block import Block
from curvlab.fisher.kronecker import KroneckerBlock
from curvlab.fisher.row_block import RowBlock
from curvlab.optim import Preconditioner
from curvlab.optim.gradients import masked
from curvlab.rows.collect import Collector
from curvlab.rows.loss import Kind
from curvlab.testing.oracle import assert_close

RHO = 0.05


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).double()


def data(N: int = 7, seed: int = 1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(N, 4, dtype=DOUBLE, generator=generator), torch.randint(3, (N,), generator=generator)


def options(key: str) -> dict[str, Any]:
    return {"sigma": [[1.0, 0.2, 0.0], [0.2, 1.0, 0.2], [0.0, 0.2, 1.0]]} if key == "layer-wise" else {}


def run(pre: Preconditioner, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    """Run a pass and return the plain gradient."""
    pre.model.zero_grad()
    with pre.collect():
        pre.loss(pre.model(x), y).backward()
    return {name: p.grad.clone() for name, p in pre.parameters.items() if p.grad is not None}


def now(pre: Preconditioner) -> Tensor:
    return torch.cat([p.grad.flatten() for p in pre.parameters.values() if p.grad is not None])


def reference(structure: Structure, gradient: dict[str, Tensor], damping: float = RHO) -> Tensor:
    solution = structure.solve(gradient, damping)
    assert isinstance(solution, dict)
    return torch.cat([value.flatten() for value in solution.values()])


@pytest.mark.parametrize("kind", ["exact", "mc", "empirical"])
@pytest.mark.parametrize("key", STRUCTURES)
def test_the_direction_is_the_solve_of_a_structure_fitted_to_the_batch(key: str, kind: str) -> None:
    model, loss, (x, y) = network(), nn.CrossEntropyLoss(), data()
    pre = Preconditioner(model, loss, make(key, **options(key)), kind=kind, damping=RHO, seed=3)  # type: ignore[arg-type]
    gradient = run(pre, x, y)
    pre.precondition()
    generator = torch.Generator().manual_seed(3) if kind == "mc" else None
    rows = sqrt_fisher(model, loss, x, y, kind, generator=generator)  # type: ignore[arg-type]
    fitted = make(key, **options(key)).update(rows)
    assert_close(now(pre), reference(fitted, gradient), 1e-8)


def spy(monkeypatch: pytest.MonkeyPatch, kind: type[Block]) -> list[str]:
    """Record which blocks solve with per-sample gradients."""
    solved: list[str] = []
    original = kind.solve_sum

    def solve_sum(self: Any, *arguments: Any) -> dict[str, Tensor]:
        solved.append(self.name)
        result: dict[str, Tensor] = original(self, *arguments)
        return result

    monkeypatch.setattr(kind, "solve_sum", solve_sum)
    return solved


@pytest.mark.parametrize("batch", [2, 200])
def test_kfac_multiplies_factors_or_gradients_whichever_is_less_work(
    batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    solved = spy(monkeypatch, KroneckerBlock)
    structure = KFAC(factored_damping=True)
    pre = Preconditioner(network(), nn.CrossEntropyLoss(), structure, damping=RHO)
    gradient = run(pre, *data(batch))
    pre.precondition()
    assert solved == (["0", "2", "4"] if batch == 2 else [])
    assert_close(now(pre), reference(structure, gradient), 1e-10)


@pytest.mark.parametrize("key", ["full", "block-diagonal"])
def test_rows_that_share_their_inputs_with_the_gradient_solve_without_it(
    key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    solved = spy(monkeypatch, RowBlock)
    structure = make(key, side="rows")
    pre = Preconditioner(network(), nn.CrossEntropyLoss(), structure, kind="mc", damping=RHO)
    gradient = run(pre, *data())
    pre.precondition()
    assert len(solved) == len(structure._blocks)
    assert_close(now(pre), reference(structure, gradient), 1e-10)


@pytest.mark.parametrize("key", ["kfac", "full", "diagonal"])
def test_a_gradient_that_was_touched_is_preconditioned_as_it_is(key: str) -> None:
    x, y = data()
    pre = Preconditioner(network(), nn.CrossEntropyLoss(), key, kind="exact", damping=RHO)
    gradient = run(pre, x, y)
    total = nn.utils.clip_grad_norm_(pre.model.parameters(), 1e-3)
    pre.precondition()
    clipped = {name: g * 1e-3 / (total + 1e-6) for name, g in gradient.items()}
    assert_close(now(pre), reference(pre.structure, clipped), 1e-8)


def scale_behind_the_back(pre: Preconditioner) -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(torch.zeros(()))
    scaler.unscale_(torch.optim.SGD(pre.model.parameters(), lr=1.0))


def edit_data(pre: Preconditioner) -> None:
    for parameter in pre.model.parameters():
        assert parameter.grad is not None
        parameter.grad.data.clamp_(-1e-2, 1e-2)


@pytest.mark.parametrize("change", [scale_behind_the_back, edit_data])
@pytest.mark.parametrize("kind", ["mc", "exact", "empirical"])
@pytest.mark.parametrize("structure", [KFAC(factored_damping=True), Full(side="rows")], ids=["kfac", "full"])
def test_a_gradient_changed_without_a_trace_is_preconditioned_as_it_is(
    structure: Structure, kind: Kind, change: Callable[[Preconditioner], None]
) -> None:
    """These change numbers and no version counter."""
    pre = Preconditioner(network(), nn.CrossEntropyLoss(), copy.deepcopy(structure), kind=kind, damping=RHO)
    run(pre, *data(2))
    change(pre)
    gradient = {name: p.grad.clone() for name, p in pre.parameters.items() if p.grad is not None}
    pre.precondition()
    assert_close(now(pre), reference(pre.structure, gradient), 1e-8)


def clip_within(pre: Preconditioner, x: Tensor, y: Tensor) -> None:
    pre.loss(pre.model(x), y).backward()
    nn.utils.clip_grad_norm_(pre.model.parameters(), 1e-3)


def penalise_parameters(pre: Preconditioner, x: Tensor, y: Tensor) -> None:
    (pre.loss(pre.model(x), y) + 1e-3 * sum(p.square().sum() for p in pre.model.parameters())).backward()


def penalise_an_activation(pre: Preconditioner, x: Tensor, y: Tensor) -> None:
    seen: list[Tensor] = []
    handle = pre.model.get_submodule("1").register_forward_hook(lambda *call: seen.append(call[-1]))
    loss = pre.loss(pre.model(x), y)
    handle.remove()
    (loss + seen[0].square().mean()).backward()


def penalise_the_gradient(pre: Preconditioner, x: Tensor, y: Tensor) -> None:
    x = x.requires_grad_()
    loss = pre.loss(pre.model(x), y)
    (slope,) = torch.autograd.grad(loss, x, create_graph=True)
    (loss + slope.square().sum()).backward()


def go_back_twice(pre: Preconditioner, x: Tensor, y: Tensor) -> None:
    loss = pre.loss(pre.model(x), y)
    loss.backward(retain_graph=True)
    loss.backward()


@pytest.mark.parametrize(
    "backward", [clip_within, penalise_parameters, penalise_an_activation, penalise_the_gradient, go_back_twice]
)
@pytest.mark.parametrize("kind", ["mc", "exact"])
@pytest.mark.parametrize("structure", [KFAC(factored_damping=True), Full(side="rows")], ids=["kfac", "full"])
def test_a_gradient_of_more_than_the_loss_is_preconditioned_as_it_is(
    structure: Structure, kind: Kind, backward: Callable[[Preconditioner, Tensor, Tensor], None]
) -> None:
    pre = Preconditioner(network(), nn.CrossEntropyLoss(), copy.deepcopy(structure), kind=kind, damping=RHO)
    with pre.collect():
        backward(pre, *data(2))
    gradient = {name: p.grad.clone() for name, p in pre.parameters.items() if p.grad is not None}
    pre.precondition()
    assert_close(now(pre), reference(pre.structure, gradient), 1e-8)


@pytest.mark.parametrize("hook", ["register_hook", "register_post_accumulate_grad_hook"])
@pytest.mark.parametrize("key", ["kfac", "full"])
def test_a_gradient_that_a_hook_changed_is_preconditioned_as_it_is(key: str, hook: str) -> None:
    options = {"factored_damping": True} if key == "kfac" else {"side": "rows"}
    pre = Preconditioner(network(), nn.CrossEntropyLoss(), make(key, **options), damping=RHO)
    weight = pre.model.get_parameter("2.weight")

    def halve(changed: Tensor) -> Tensor | None:
        if changed is not weight:
            return changed / 2
        assert weight.grad is not None
        weight.grad /= 2
        return None

    handle = getattr(weight, hook)(halve)
    gradient = run(pre, *data(2))
    pre.precondition()
    assert_close(now(pre), reference(pre.structure, gradient), 1e-8)
    handle.remove()
    weight.grad = None
    gradient_without = run(pre, *data(2))["2.weight"]
    assert_close(gradient["2.weight"], gradient_without / 2, 1e-12)


@pytest.mark.parametrize("key", STRUCTURES)
def test_what_becomes_of_the_gradients_afterwards_is_the_users(key: str) -> None:
    pre, other = (
        Preconditioner(network(), nn.CrossEntropyLoss(), make(key, **options(key)), damping=RHO, seed=3)
        for _ in range(2)
    )
    for seed in range(3):
        run(pre, *data(seed=seed))
        run(other, *data(seed=seed))
        pre.precondition()
        other.precondition()
        assert torch.equal(now(pre), now(other))
        for parameter in pre.parameters.values():
            assert parameter.grad is not None
            assert parameter.grad.stride() == parameter.stride()
            parameter.grad.fill_(torch.nan)


def test_gradients_that_live_longer_than_a_pass_stay_where_they_are() -> None:
    pre, kept = Preconditioner(network(), nn.CrossEntropyLoss(), damping=RHO), {}
    for name, parameter in pre.parameters.items():
        kept[name] = parameter.grad = torch.zeros_like(parameter)
    for _ in range(2):
        pre.model.zero_grad(set_to_none=False)
        with pre.collect():
            pre.loss(pre.model(data()[0]), data()[1]).backward()
        pre.precondition()
        assert all(parameter.grad is kept[name] for name, parameter in pre.parameters.items())


@pytest.mark.parametrize("key", ["kfac", "ekfac", "full", "block-diagonal", "diagonal", "unit-wise"])
def test_passes_before_a_step_accumulate(key: str) -> None:
    """Two halves of a batch give what the batch gives."""
    model, loss, (x, y) = network(), nn.CrossEntropyLoss(), data(8)
    pre = Preconditioner(model, loss, key, kind="exact", damping=RHO)
    model.zero_grad()
    for half in (slice(0, 4), slice(4, 8)):
        with pre.collect():
            (loss(model(x[half]), y[half]) / 2).backward()
    gradient = {name: p.grad.clone() for name, p in pre.parameters.items() if p.grad is not None}
    pre.precondition()
    rows = [sqrt_fisher(model, loss, x[half], y[half], "exact") for half in (slice(0, 4), slice(4, 8))]
    fitted = make(key).update(rows[0]).update(rows[1], 1.0)
    assert_close(now(pre), reference(fitted, gradient), 1e-8)


@pytest.mark.parametrize(("every", "refreshed"), [(2, (0, 2, 4, 6)), (lambda step: 1 if step < 3 else 3, (0, 1, 2, 5))])
def test_curvature_is_refreshed_averaged_and_reused(every: Any, refreshed: tuple[int, ...]) -> None:
    model, loss = network(), nn.CrossEntropyLoss()
    pre = Preconditioner(model, loss, "kfac", kind="exact", damping=RHO, decay=0.5, refresh_every=every)
    fitted = KFAC()
    for step in range(7):
        x, y = data(seed=step)
        rows = sqrt_fisher(model, loss, x, y, "exact")
        if step in refreshed:
            assert pre.due
            fitted.update(rows, 0.5)
            gradient = run(pre, x, y)
        else:
            assert not pre.due
            model.zero_grad()
            loss(model(x), y).backward()
            gradient = {name: p.grad.clone() for name, p in pre.parameters.items() if p.grad is not None}
        pre.precondition()
        assert_close(now(pre), reference(fitted, gradient), 1e-9)


@pytest.mark.parametrize("kind", ["mc", "exact", "empirical"])
def test_a_step_that_is_not_finite_is_skipped_for_plain_parameters_too(kind: Kind) -> None:
    pre = Preconditioner(network(), nn.CrossEntropyLoss(), kind=kind, damping=RHO, plain=("4",))
    x, y = data()
    run(pre, x * torch.nan, y)
    pre.precondition()
    assert pre.skipped == 1
    assert all(parameter.grad is None for parameter in pre.model.parameters())
    run(pre, x, y)
    pre.model.get_parameter("4.bias").grad.fill_(torch.inf)  # type: ignore[union-attr]
    pre.precondition()
    assert pre.skipped == 2
    assert all(parameter.grad is None for parameter in pre.model.parameters())


def test_the_loss_may_be_called_by_keywords() -> None:
    pre, expected = (Preconditioner(network(), nn.CrossEntropyLoss(), kind="exact", damping=RHO) for _ in range(2))
    x, y = data()
    with pre.collect():
        pre.loss(target=y, input=pre.model(x)).backward()
    run(expected, x, y)
    pre.precondition()
    expected.precondition()
    assert torch.equal(now(pre), now(expected))


def test_passes_that_were_given_up_are_forgotten() -> None:
    pre, expected = (Preconditioner(network(), nn.CrossEntropyLoss(), kind="exact", damping=RHO) for _ in range(2))
    for seed in range(4):
        run(pre, *data(seed=seed))
    run(expected, *data(seed=3))
    pre.precondition()
    expected.precondition()
    assert torch.equal(now(pre), now(expected))


def test_a_state_from_before_the_first_step_begins_anew() -> None:
    pre, expected = (Preconditioner(network(), nn.CrossEntropyLoss(), kind="exact", damping=RHO) for _ in range(2))
    blank = copy.deepcopy(pre.state_dict())
    run(pre, *data(seed=1))
    pre.precondition()
    run(pre, *data(seed=2))
    pre.load_state_dict(blank)
    for each in (pre, expected):
        run(each, *data(seed=3))
        each.precondition()
    assert torch.equal(now(pre), now(expected))


@pytest.mark.parametrize("given", ["plain", "compiled"])
def test_a_compiled_model_is_seen_through(given: str) -> None:
    model = network()
    compiled = torch.compile(model, backend="eager")
    x, y = data()
    compiled(x)
    pre = Preconditioner(model if given == "plain" else compiled, nn.CrossEntropyLoss(), kind="exact", damping=RHO)  # type: ignore[arg-type]
    expected = Preconditioner(network(), nn.CrossEntropyLoss(), kind="exact", damping=RHO)
    with pre.collect():
        pre.loss(compiled(x), y).backward()
    run(expected, x, y)
    pre.precondition()
    expected.precondition()
    assert_close(now(pre), now(expected), 1e-12)


def test_the_users_gradient_at_the_outputs_stays() -> None:
    pre, (x, y) = Preconditioner(network(), nn.CrossEntropyLoss(), damping=RHO), data()
    with pre.collect():
        z = pre.model(x)
        z.retain_grad()
        pre.loss(z, y).backward()
    pre.precondition()
    assert_close(z.grad, torch.autograd.grad(pre.loss(leaf := z.detach().requires_grad_(), y), leaf)[0], 1e-12)


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


def test_a_structure_that_has_curvature_already_takes_the_first_batch() -> None:
    used, model, loss = Full(), network(), nn.CrossEntropyLoss()
    used.update(sqrt_fisher(model, loss, *data(seed=1)))
    pre = Preconditioner(model, loss, used, kind="exact", damping=RHO)
    gradient = run(pre, *data(seed=2))
    pre.precondition()
    fitted = Full().update(sqrt_fisher(model, loss, *data(seed=2)))
    assert_close(now(pre), reference(fitted, gradient), 1e-8)


def test_a_skipped_step_has_had_its_turn_once_there_is_curvature() -> None:
    pre = Preconditioner(network(), nn.CrossEntropyLoss(), damping=RHO, refresh_every=2)
    due = []
    for step in range(7):
        due.append(pre.due)
        x, y = data(seed=step)
        run(pre, x * torch.nan if step in (0, 3) else x, y)
        pre.precondition()
    assert due == [True, True, False, True, False, True, False]
    assert pre.skipped == 2


@pytest.mark.parametrize("kind", ["mc", "empirical"])
def test_steps_leave_nothing_behind(kind: Kind) -> None:
    model, loss, (x, y) = network(), nn.CrossEntropyLoss(), data()
    pre = Preconditioner(model, loss, KFAC(), kind=kind, damping=RHO, seed=0)
    outputs = []
    gc.collect()
    gc.disable()
    try:
        for _ in range(3):
            model.zero_grad()
            with pre.collect():
                z = model(x)
                loss(z, y).backward()
            pre.precondition()
            outputs.append(weakref.ref(z))
            del z
        assert [z() for z in outputs] == [None] * 3
        assert not [found for found in gc.get_objects() if type(found) is Collector and found._model is model]
        last = weakref.ref(model)
        del model, pre
        assert last() is None
    finally:
        gc.enable()


def test_inverses_are_made_in_turns_and_kept_in_between() -> None:
    model, loss = network(), nn.CrossEntropyLoss()
    structure = KFAC(factored_damping=True, invert_every=3)
    pre = Preconditioner(model, loss, structure, kind="exact", damping=RHO)
    kept = []
    for step in range(7):
        run(pre, *data(seed=step))
        pre.precondition()
        kept.append([block._inverses[0] for block in structure._blocks])  # type: ignore[attr-defined]
    made = [[a[k] is not b[k] for k in range(3)] for a, b in pairwise(kept)]
    assert [sum(step) for step in made] == [1] * 6
    assert all(sum(step[k] for step in made) == 2 for k in range(3))


@pytest.mark.parametrize(
    ("optimizer", "lr"),
    [(torch.optim.SGD, 0.3), (torch.optim.Adam, 0.02), (torch.optim.AdamW, 0.02), (torch.optim.RMSprop, 0.02)],
)
def test_it_composes_with_any_optimiser(optimizer: Callable[..., torch.optim.Optimizer], lr: float) -> None:
    model, loss, (x, y) = network(), nn.CrossEntropyLoss(), data(30)
    pre = Preconditioner(model, loss, KFAC(factored_damping=True), damping=RHO)
    stepper = optimizer(model.parameters(), lr=lr)
    before = float(loss(model(x), y).detach())
    for _ in range(15):
        run(pre, x, y)
        pre.precondition()
        stepper.step()
    assert float(loss(model(x), y).detach()) < 0.9 * before


def test_modules_and_parameters_can_keep_their_plain_gradient() -> None:
    model, loss, (x, y) = network(), nn.CrossEntropyLoss(), data()
    pre = Preconditioner(model, loss, "kfac", kind="exact", damping=RHO, plain=("2", "4.bias"))
    assert set(pre.parameters) == {"0.weight", "0.bias", "4.weight"}
    run(pre, x, y)
    untouched = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    pre.precondition()
    for name, p in model.named_parameters():
        assert p.grad is not None
        assert torch.equal(p.grad, untouched[name]) == (name in ("2.weight", "2.bias", "4.bias"))
    with pytest.raises(ValueError, match=r"'4\.bia'.*4\.bias"):
        Preconditioner(model, loss, plain=("4.bia",))
    with pytest.raises(UnsupportedModel, match="nothing to precondition"):
        Preconditioner(model, loss, plain=("0", "2", "4"))


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


def test_frozen_parameters_have_no_part() -> None:
    model, (x, y) = network(), data()
    model[0].weight.requires_grad_(False)
    pre = Preconditioner(model, nn.CrossEntropyLoss(), "kfac", kind="exact", damping=RHO)
    gradient = run(pre, x, y)
    pre.precondition()
    assert "0.weight" not in gradient
    assert model[0].weight.grad is None
    assert_close(now(pre), reference(pre.structure, gradient), 1e-9)


@pytest.mark.parametrize("key", STRUCTURES)
@pytest.mark.parametrize("kind", ["mc", "empirical", "exact"])
def test_a_batch_of_one(key: str, kind: str) -> None:
    pre = Preconditioner(network(), nn.CrossEntropyLoss(), make(key, **options(key)), kind=kind, damping=RHO)  # type: ignore[arg-type]
    gradient = run(pre, *data(1))
    pre.precondition()
    assert_close(now(pre), reference(pre.structure, gradient), 1e-7)


def normalised() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Dropout(0.2), nn.Linear(6, 3)).double()


@pytest.mark.parametrize("key", ["kfac", "ekfac", "diagonal"])
def test_batch_normalisation_in_training_is_allowed_for_moments_and_said(key: str) -> None:
    pre = Preconditioner(normalised(), nn.CrossEntropyLoss(), key, damping=RHO)
    assert "batch coupling ignored in 1" in repr(pre)
    gradient = run(pre, *data())
    pre.precondition()
    assert_close(now(pre), reference(pre.structure, gradient), 1e-8)
    pre.model.eval()
    assert "batch coupling" not in repr(pre)


@pytest.mark.parametrize("key", [key for key in STRUCTURES if not STRUCTURES[key].averages])
def test_batch_normalisation_in_training_is_refused_by_structures_of_rows(key: str) -> None:
    pre = Preconditioner(normalised(), nn.CrossEntropyLoss(), make(key, **options(key)), damping=RHO)
    with pytest.raises(UnsupportedModel, match=r"1 normalise by the batch.*eval\(\)"):
        run(pre, *data())


def test_steps_that_are_not_finite_are_skipped_and_counted() -> None:
    model, loss, (x, y) = network(), nn.CrossEntropyLoss(), data()
    pre = Preconditioner(model, loss, "kfac", damping=RHO, patience=2)
    run(pre, x, y)
    pre.precondition()
    before = pre.structure.to_dense()
    for _ in range(2):
        run(pre, x, y)
        for p in pre.parameters.values():
            assert p.grad is not None
            p.grad.fill_(torch.nan)
        pre.precondition()
        assert all(p.grad is None for p in pre.parameters.values())
    assert torch.equal(pre.structure.to_dense(), before)
    assert pre.skipped == 2
    run(pre, x, y)
    pre.precondition()
    assert "2 skipped" in repr(pre)
    with pytest.raises(FloatingPointError, match="3 steps in a row"):  # noqa: PT012
        for _ in range(3):
            run(pre, x, y)
            model[0].weight.grad[0, 0] = torch.inf
            pre.precondition()


def test_where_a_device_is_not_waited_for_the_direction_becomes_zero() -> None:
    direction = {"a": torch.ones(2), "b": torch.ones(3)}
    good, bad = {"a": torch.ones(2), "b": torch.ones(3)}, {"a": torch.ones(2), "b": torch.tensor([1.0, torch.nan, 1.0])}
    assert all(torch.equal(masked(direction, good)[name], direction[name]) for name in direction)
    assert not any(bool(value.any()) for value in masked(direction, bad).values())


def test_steps_without_new_curvature_are_skipped_alike() -> None:
    pre = Preconditioner(network(), nn.CrossEntropyLoss(), "kfac", damping=RHO, refresh_every=5)
    run(pre, *data())
    pre.precondition()
    run(pre, *data())
    next(iter(pre.parameters.values())).grad.fill_(torch.nan)  # type: ignore[union-attr]
    pre.precondition()
    assert pre.skipped == 1
    assert pre.steps == 2


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
        ({"samples": 0}, "samples is a whole number"),
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


def test_hyper_parameters_may_follow_the_step() -> None:
    pre = Preconditioner(network(), nn.CrossEntropyLoss(), "kfac", kind="exact", damping=lambda t: RHO * (t + 1))
    for step in range(3):
        gradient = run(pre, *data())
        pre.precondition()
        assert_close(now(pre), reference(pre.structure, gradient, RHO * (step + 1)), 1e-9)
    falling = Preconditioner(network(), nn.CrossEntropyLoss(), damping=lambda t: 1.0 - t)
    for _ in range(2):
        run(falling, *data())
        falling.precondition()
    run(falling, *data())
    with pytest.raises(ValueError, match=r"damping is a number.*got -1\.0 at step 2"):
        falling.precondition()


@pytest.mark.parametrize("key", STRUCTURES)
def test_a_saved_state_continues_bit_for_bit(key: str) -> None:
    def make_one() -> Preconditioner:
        structure = KFAC(factored_damping=True, invert_every=3) if key == "kfac" else make(key, **options(key))
        return Preconditioner(network(), nn.CrossEntropyLoss(), structure, damping=RHO, refresh_every=2)

    first = make_one()
    for step in range(3):
        run(first, *data(seed=step))
        first.precondition()
    saved = copy.deepcopy(first.state_dict())
    second = make_one()
    second.load_state_dict(saved)
    for step in range(3, 8):
        for pre in (first, second):
            run(pre, *data(seed=step))
            pre.precondition()
        assert torch.equal(now(first), now(second))


def test_loss_scaling_changes_nothing_but_the_gradient() -> None:
    """Gradients scaled by a GradScaler are unscaled before they are preconditioned."""
    model, loss, (x, y) = network().float(), nn.CrossEntropyLoss(), data(40)
    x = x.float()
    pre = Preconditioner(model, loss, "kfac", kind="empirical", damping=RHO)
    stepper = torch.optim.SGD(model.parameters(), lr=1.0)
    gradient = torch.autograd.grad(loss(model(x), y), list(model.parameters()))
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    with pre.collect():
        scaler.scale(loss(model(x), y)).backward()
    scaler.unscale_(stepper)
    pre.precondition()
    fitted = KFAC().update(sqrt_fisher(model, loss, x, y, "empirical"))
    assert_close(now(pre), reference(fitted, dict(zip(pre.parameters, gradient, strict=True))), 1e-3)


class Cast(nn.Module):
    """Layers in types of their own."""

    def __init__(self, types: tuple[torch.dtype, ...]) -> None:
        super().__init__()
        self.layers, self.types = network(), types
        for layer, dtype in zip(self.layers[::2], types, strict=True):
            layer.to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        for layer, dtype in zip(self.layers[::2], self.types, strict=True):
            x = layer(x.to(dtype)).tanh()
        return x


HALF, SINGLE = torch.bfloat16, torch.float32


@pytest.mark.parametrize("types", [(HALF,) * 3, (HALF, SINGLE, HALF), (SINGLE, DOUBLE, SINGLE)], ids=str)
@pytest.mark.parametrize("kind", ["exact", "empirical"])
@pytest.mark.parametrize("key", STRUCTURES)
def test_curvature_of_half_and_mixed_precision_is_in_float32_or_wider(
    key: str, kind: Kind, types: tuple[torch.dtype, ...]
) -> None:
    model, exact = Cast(types), Cast((DOUBLE,) * 3)
    exact.load_state_dict(model.state_dict())
    loss, (x, y) = nn.CrossEntropyLoss(), data(12)
    x = x.bfloat16().double()
    found = []
    for network in (model, exact):
        pre = Preconditioner(network, loss, make(key, **options(key)), kind=kind, damping=0.5)
        for _ in range(2):
            run(pre, x, y)
            pre.precondition()
        found.append(now(pre).double())
        assert pre.structure.dtype == max((SINGLE, *types), key=lambda t: t.itemsize) or network is exact
    assert [p.grad.dtype for p in model.layers[::2].parameters() if p.grad is not None] == [
        t for t in types for _ in "wb"
    ]
    eps = max(torch.finfo(dtype).eps for dtype in types)
    assert float((found[0] - found[1]).norm() / found[1].norm()) < 8 * eps


@pytest.mark.parametrize("key", ["kfac", "full", "diagonal"])
def test_nodes_of_a_graph_are_one_sample(key: str) -> None:
    from torch_geometric.nn import GCN

    torch.manual_seed(0)
    model, loss = GCN(4, 6, 2, 3).double(), nn.CrossEntropyLoss()
    x, edges, nodes = torch.randn(8, 4, dtype=DOUBLE), torch.randint(8, (2, 20)), torch.tensor([1, 4, 6])
    targets = torch.randint(3, (3,))
    pre = Preconditioner(model, loss, key, kind="exact", damping=RHO, graph=True)
    with pre.collect():
        loss(model(x, edges)[nodes], targets).backward()
    gradient = {name: p.grad.clone() for name, p in pre.parameters.items() if p.grad is not None}
    pre.precondition()
    fitted = make(key).update(sqrt_fisher(model, loss, (x, edges), targets, nodes=nodes))
    assert_close(now(pre), reference(fitted, gradient), 1e-8)


@pytest.mark.parametrize("second", ["mc", "exact", "empirical"])
@pytest.mark.parametrize("first", ["mc", "ggn", "empirical"])
@pytest.mark.parametrize("structure", ["kfac", "full"])
def test_two_preconditioners_share_a_pass(structure: str, first: Any, second: Any) -> None:
    """One a layer, with structures of their own: each does what it does alone."""
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    loss, x, y = nn.CrossEntropyLoss(), torch.randn(6, 3, dtype=torch.float64), torch.arange(6) % 2

    def make(only: str) -> Preconditioner:
        if only == "0":
            return Preconditioner(model, loss, structure, kind=first, plain=("2",))
        return Preconditioner(model, loss, "diagonal", kind=second, plain=("0",))

    def step(*layers: str) -> dict[str, Tensor]:
        model.zero_grad()
        made = [make(layer) for layer in layers]
        with ExitStack() as within:
            for preconditioner in made:
                within.enter_context(preconditioner.collect())
            loss(model(x), y).backward()
        for preconditioner in made:
            preconditioner.precondition()
        return {n: p.grad.clone() for n, p in model.named_parameters() if n[0] in layers and p.grad is not None}

    expected = step("0") | step("2")
    for name, found in step("0", "2").items():
        torch.testing.assert_close(found, expected[name])


class BareScale(nn.Module):
    """A parameter without factored rows between two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.scale, self.last = nn.Linear(4, 5), nn.Parameter(torch.randn(5)), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.last(torch.tanh(self.first(x) * self.scale))
        return out


def attention() -> nn.Module:
    inner = nn.TransformerEncoderLayer(2, 1, 3, dropout=0.0, batch_first=True)
    return nn.Sequential(nn.Unflatten(1, (2, 2)), inner, nn.Flatten(), nn.Linear(4, 3))


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("build", [network, BareScale, attention])
def test_two_preconditioners_of_the_same_parameters(build: Callable[[], nn.Module], shared: bool) -> None:
    """In one pass or in turn, each does what it does alone; the second acts on what the first has made of the gradients."""
    torch.manual_seed(0)
    model, loss, (x, y) = build().double(), nn.CrossEntropyLoss(), data()

    def made() -> list[Preconditioner]:
        return [
            Preconditioner(model, loss, "kfac", kind="exact", damping=RHO),
            Preconditioner(model, loss, "full", kind="empirical", damping=RHO),
        ]

    def passed(*preconditioners: Preconditioner) -> dict[str, Tensor]:
        model.zero_grad()
        with ExitStack() as within:
            for one in preconditioners:
                within.enter_context(one.collect())
            loss(model(x), y).backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    alone = made()
    gradients = [passed(one) for one in alone]
    first = alone[0].direction(gradients[0])
    assert first is not None
    second = alone[1].direction(first if shared else gradients[1])
    together = made()
    if shared:
        passed(*together)
        for one in together:
            one.precondition()
            for name, p in model.named_parameters():
                assert_close(p.grad, (first if one is together[0] else second)[name], 1e-9)
    else:
        for _ in range(2):
            for one, expected in zip(together, (first, second), strict=True):
                passed(one)
                one.precondition()
                for name, p in model.named_parameters():
                    assert_close(p.grad, expected[name], 1e-9)
    assert not any("forward" in vars(module) for module in model.modules())
