"""Passes over data sets: progress, checkpoints, and data that are not the same twice."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from fisher_cases import case
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import curvlab.fisher as cf
from curvlab.errors import StateError, UnsupportedModel
from curvlab.fisher.component_wise import Partition, units
from curvlab.fisher.fitting import fingerprint
from curvlab.testing.oracle import assert_close

KEYS = tuple(cf.STRUCTURES)


class Interrupted(Exception):
    pass


class Loader:
    """Batches of two samples, until something interrupts after a number of them, all passes counted."""

    def __init__(self, inputs: Tensor, targets: Tensor, after: int | None = None) -> None:
        self.inputs, self.targets, self.after, self.given = inputs, targets, after, 0

    def __len__(self) -> int:
        return len(self.inputs) // 2

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for k in range(len(self)):
            if self.given == self.after:
                raise Interrupted
            self.given += 1
            yield self.inputs[2 * k : 2 * k + 2], self.targets[2 * k : 2 * k + 2]


def contents(state: Any) -> Iterator[Tensor]:
    """All tensors in a state."""
    if isinstance(state, Tensor):
        yield state
    elif isinstance(state, dict):
        for value in state.values():
            yield from contents(value)
    elif isinstance(state, list | tuple):
        for value in state:
            yield from contents(value)


@pytest.mark.parametrize("kind", ["exact", "mc"])
@pytest.mark.parametrize("key", KEYS)
def test_a_fit_goes_on_where_it_was_interrupted(key: str, kind: str, tmp_path: Path) -> None:
    """At every batch of every pass: the state is that of a fit without interruption, bit for bit, and so are draws."""
    data = case("cnn", "ce-weights", N=6)

    def fit(loader: Any, **how: Any) -> tuple[cf.Structure, torch.Generator | None]:
        source = torch.Generator().manual_seed(3) if kind == "mc" else None
        made = cf.STRUCTURES[key].fit(data.model, data.loss, loader, kind=kind, generator=source, **how)
        return made, source

    plain, source = fit(Loader(data.inputs, data.targets))
    total = 3 * plain.passes
    state = list(contents(plain.state_dict()))
    for after in range(total):
        path = tmp_path / f"{after}"
        with pytest.raises(Interrupted):
            fit(Loader(data.inputs, data.targets, after), checkpoint=path, checkpoint_every=0.0)
        assert path.exists() == (after > 0)
        resumed, again = fit(Loader(data.inputs, data.targets), checkpoint=str(path))
        assert all(torch.equal(a, b) for a, b in zip(state, contents(resumed.state_dict()), strict=True))
        assert torch.equal(plain.to_dense(), resumed.to_dense())
        if source is not None and again is not None:
            assert torch.equal(source.get_state(), again.get_state())


def test_batches_that_are_done_cost_no_sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = case("mlp", "ce", N=6)
    cf.EKFAC.fit(data.model, data.loss, Loader(data.inputs, data.targets), checkpoint=tmp_path / "done")
    monkeypatch.setattr("curvlab.fisher.fitting.rows_of_loss", lambda *_, **__: pytest.fail("swept again"))
    cf.EKFAC.fit(data.model, data.loss, Loader(data.inputs, data.targets), checkpoint=tmp_path / "done")


@pytest.mark.parametrize("damage", ["truncated", "keys", "state"])
def test_a_damaged_checkpoint_is_refused_by_name(damage: str, tmp_path: Path) -> None:
    data = case("mlp", "ce", N=6)
    path = tmp_path / "state"
    loader = Loader(data.inputs, data.targets)
    cf.KFAC.fit(data.model, data.loss, loader, checkpoint=path)
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:-200])
    else:
        content = torch.load(path, weights_only=True)
        torch.save({"identity": content["identity"]} if damage == "keys" else {**content, "state": {}}, path)
    with pytest.raises(StateError, match=r"state' is damaged, or not the checkpoint of a fit \(\w+\)\. Delete it"):
        cf.KFAC.fit(data.model, data.loss, loader, checkpoint=path)


def test_a_checkpoint_of_another_fit_is_refused(tmp_path: Path) -> None:
    data = case("mlp", "ce", N=6)
    path = tmp_path / "state"
    loader = Loader(data.inputs, data.targets)

    def fit(key: str = "kfac", loss: nn.Module = data.loss, batches: Any = loader, **how: Any) -> None:
        cf.STRUCTURES[key].fit(data.model, loss, batches, checkpoint=path, **how)

    fit()
    with pytest.raises(StateError, match=r"checkpoint of another fit: the structure differs\. Delete it"):
        fit("diagonal")
    with pytest.raises(StateError, match="the structure differs"):
        fit(sharing="reduce")
    with pytest.raises(StateError, match="the loss differs"):
        fit(loss=nn.CrossEntropyLoss(label_smoothing=0.1))
    with pytest.raises(StateError, match="the kind of rows differs"):
        fit(kind="ggn")
    with pytest.raises(ValueError, match="Batch 0 of pass 1 is not what it was before"):
        fit(batches=Loader(data.inputs + 1, data.targets))
    with pytest.raises(ValueError, match="Pass 1 ended after 2 batches; there were 3 before"):
        fit(batches=Loader(data.inputs[:4], data.targets[:4]))
    with torch.no_grad():
        next(data.model.parameters()).mul_(1.5)
    try:
        with pytest.raises(StateError, match="the model's state differs"):
            fit()
    finally:
        with torch.no_grad():
            next(data.model.parameters()).div_(1.5)
    with pytest.raises(StateError, match=r"nowhere/state' cannot be written"):
        cf.KFAC.fit(data.model, data.loss, loader, checkpoint=tmp_path / "nowhere" / "state")


def pairs() -> Partition:
    """Return the partition into pairs, defined anew as in another process."""
    return lambda _, layout: (torch.arange(layout.size) // 2).view(layout.units, layout.width)


def test_a_partition_is_known_again_by_where_its_function_is_defined(tmp_path: Path) -> None:
    data, path = case("mlp", "ce", N=6), tmp_path / "state"

    def fit(partition: Partition) -> cf.Structure:
        loader = Loader(data.inputs, data.targets)
        return cf.ComponentWise.fit(data.model, data.loss, loader, checkpoint=path, partition=partition)

    assert torch.equal(fit(pairs()).to_dense(), fit(pairs()).to_dense())
    with pytest.raises(StateError, match="checkpoint of another fit: the structure differs"):
        fit(units)


def test_a_full_disk_is_a_checkpoint_that_cannot_be_written(tmp_path, full_disk) -> None:
    data = case("mlp", "ce", N=6)
    full_disk.after(0)
    with pytest.raises(StateError, match=r"state' cannot be written: .*No space left"):
        cf.KFAC.fit(data.model, data.loss, (data.inputs, data.targets), checkpoint=tmp_path / "state")


def test_data_that_differ_between_passes() -> None:
    data = case("mlp", "ce", N=6)
    dataset = TensorDataset(data.inputs, data.targets)
    shuffled = DataLoader(dataset, batch_size=2, shuffle=True, generator=torch.Generator().manual_seed(0))
    with pytest.raises(ValueError, match=r"EKFAC goes over the data twice, and the loader shuffles.*use shuffle=False"):
        cf.EKFAC.fit(data.model, data.loss, shuffled)
    with pytest.raises(ValueError, match="A checkpoint skips batches, and the loader shuffles"):
        cf.KFAC.fit(data.model, data.loss, shuffled, checkpoint="state")
    assert cf.KFAC.fit(data.model, data.loss, shuffled).count == 6

    class Augmented(Loader):
        def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
            self.inputs = self.inputs + 1
            return super().__iter__()

    with pytest.raises(ValueError, match=r"Batch 0 of pass 2 is not what it was before: .* augmented at random"):
        cf.EKFAC.fit(data.model, data.loss, Augmented(data.inputs, data.targets))


@pytest.mark.parametrize("layer", [nn.Dropout(0.5), nn.BatchNorm1d(5)], ids=["dropout", "batchnorm"])
def test_models_that_are_random_or_couple_samples(layer: nn.Module) -> None:
    model = nn.Sequential(nn.Linear(4, 5), layer, nn.Linear(5, 3)).double()
    batch = torch.randn(4, 4, dtype=torch.float64), torch.tensor([0, 1, 2, 0])
    with pytest.raises(UnsupportedModel, match=rf"{type(layer).__name__} '1' is in training mode.*model\.eval\(\)"):
        cf.KFAC.fit(model, nn.CrossEntropyLoss(), batch)
    assert cf.KFAC.fit(model.eval(), nn.CrossEntropyLoss(), batch).count == 4


def test_progress(capsys: pytest.CaptureFixture[str]) -> None:
    data = case("mlp", "ce", N=6)
    cf.EKFAC.fit(data.model, data.loss, Loader(data.inputs, data.targets), progress=True)
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "[1/6] batch 1 of pass 1: done" in shown.err
    assert "[6/6] batch 3 of pass 2: done" in shown.err
    with pytest.raises(ValueError, match="progress=True needs data with a length"):
        cf.KFAC.fit(data.model, data.loss, iter([(data.inputs, data.targets)]), progress=True)


def test_fingerprints_see_every_tensor() -> None:
    x, y = torch.randn(3, 2), torch.tensor([0, 1, 2])
    same = fingerprint((x, {"a": y, "b": 1}))
    assert same == fingerprint((x.clone(), {"a": y.clone(), "b": 1}))
    others = [
        (x + 1, {"a": y, "b": 1}),
        (x, {"a": y.flip(0), "b": 1}),
        (x, {"a": y, "b": 2}),
        (x.view(2, 3), {"a": y, "b": 1}),
    ]
    assert all(fingerprint(other) != same for other in others)
    assert fingerprint(x.bfloat16()) != fingerprint(x.half())


@pytest.mark.parametrize("key", KEYS)
def test_batches_without_a_target_that_counts(key: str) -> None:
    torch.manual_seed(0)
    model, loss = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double(), nn.CrossEntropyLoss()
    x, y = torch.randn(6, 3, dtype=torch.float64), torch.tensor([-100, -100, 0, 2, -100, -100])
    whole = cf.STRUCTURES[key].fit(model, loss, (x, y)).to_dense()
    for sizes in (2, 1):
        parts = list(zip(x.split(sizes), y.split(sizes), strict=True))
        assert_close(cf.STRUCTURES[key].fit(model, loss, parts).to_dense(), whole)
    with pytest.raises(ValueError, match="No target carries weight"):
        cf.STRUCTURES[key].fit(model, loss, [(x[:1], y[:1]), (x[4:], y[4:])])


@pytest.mark.parametrize(
    ("batch", "message"),
    [((torch.ones(2, 3), torch.ones(2), 1), "got a tuple of 3"), ({"x": torch.ones(2, 3)}, "got a dict")],
)
def test_batches_that_are_no_pairs(batch: Any, message: str) -> None:
    with pytest.raises(ValueError, match=rf"A batch is a pair \(inputs, targets\), {message}"):
        cf.KFAC.fit(nn.Linear(3, 2), nn.MSELoss(), [batch])
