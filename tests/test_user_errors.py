"""What somebody is told, or what happens, who hands over something else than what a function takes."""

from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import curvlab
from curvlab.errors import StateError, UnsupportedModel
from curvlab.fisher import KFAC, BlockDiagonal, Diagonal, PerLayer, make
from curvlab.optim import NaturalGradient, Preconditioner
from curvlab.spectrum import (
    GGN,
    DiagonalPreconditioner,
    Fisher,
    Hessian,
    Preconditioned,
    block_map,
    by_layer,
    density,
    eigenpairs,
    rank,
    trace,
)

pytestmark = pytest.mark.usefixtures("unchecked_types")
CLASSES, KINDS = 3, ("exact", "mc", "empirical")
loss = nn.CrossEntropyLoss()


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, CLASSES)).double()


model = network()
x, y = torch.randn(10, 6, dtype=torch.float64), torch.randint(CLASSES, (10,))
loader = DataLoader(TensorDataset(x, y), 5)
rows, hessian = curvlab.sqrt_fisher(model, loss, x, y), Hessian(model, loss, (x, y))


def untyped(thing: object) -> Any:
    """Return what no type checker lets pass."""
    return thing


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def train(
    net: nn.Module, inputs: Tensor, targets: Tensor, steps: int = 1, of: nn.Module = loss, **options: Any
) -> Preconditioner:
    """Take steps without moving, as what is asked is what is said."""
    natural = Preconditioner(net, of, patience=steps - 1 or 1, **options)
    for _ in range(steps):
        net.zero_grad()
        with natural.collect():
            of(net(inputs), targets).backward()
        natural.precondition()
    return natural


def test_one_name_is_as_good_as_a_list_of_names() -> None:
    assert rank(rows, parameters="0").columns == rank(rows, parameters=["0"]).columns == 56
    assert Hessian(model, loss, (x, y), parameters="0.weight").size == 48
    assert Preconditioner(model, loss, plain="2", kl_clip=None).plain == ("2",)
    alone = BlockDiagonal(partition=["0.weight", "0.bias", "2.weight", "2.bias"]).update(rows)
    grouped = BlockDiagonal(partition=[["0.weight"], ["0.bias"], ["2.weight"], ["2.bias"]]).update(rows)
    assert torch.equal(alone.to_dense(), grouped.to_dense())


def test_one_structure_is_as_good_as_a_choice_by_pattern_and_a_class_as_its_key() -> None:
    for one in ("diagonal", Diagonal, Diagonal()):
        assert torch.equal(PerLayer(one).update(rows).to_dense(), Diagonal().update(rows).to_dense())
        assert isinstance(make(one), Diagonal)
        assert isinstance(Preconditioner(model, loss, one).structure, Diagonal)
    assert make(KFAC, sharing="reduce").options["sharing"] == "reduce"


def test_a_loader_a_list_of_pairs_and_a_pair_in_a_list_are_the_same_data() -> None:
    whole = KFAC.fit(model, loss, (x, y)).to_dense()
    for data in (loader, [[x[:5], y[:5]], [x[5:], y[5:]]], [x, y]):
        assert torch.allclose(KFAC.fit(model, loss, data).to_dense(), whole)
        assert float(Hessian(model, loss, data).to_dense().trace()) == pytest.approx(
            float(Hessian(model, loss, (x, y)).to_dense().trace())
        )


def test_rows_and_operators_say_themselves_where_their_parameters_are() -> None:
    assert by_layer(rows).names == by_layer(rows.space).names == by_layer(Hessian(model, loss, (x, y))).names


REFUSED: dict[str, tuple[Callable[[], object], type[Exception], str]] = {
    "a module in plain": (
        lambda: Preconditioner(model, loss, plain=untyped(model[2]), kl_clip=None),
        ValueError,
        "names, such as 'head', got a Linear",
    ),
    "an unknown name in plain": (
        lambda: Preconditioner(model, loss, plain="head", kl_clip=None),
        ValueError,
        "in plain 'head'. Known: 0.weight, ",
    ),
    "parameters": (
        lambda: NaturalGradient(untyped(model.parameters()), loss, 0.1, kl_clip=None),
        UnsupportedModel,
        "not its parameters",
    ),
    "a class of models": (
        lambda: curvlab.jacobian(untyped(nn.Linear), x),
        UnsupportedModel,
        "got the class Linear: pass the module",
    ),
    "a function to expand": (
        lambda: curvlab.linearize(untyped(torch.relu)),
        UnsupportedModel,
        "is a torch.nn.Module, got a builtin",
    ),
    "a class of losses": (
        lambda: curvlab.sqrt_fisher(model, untyped(nn.MSELoss), x, y),
        UnsupportedModel,
        r"MSELoss\(\)",
    ),
    "a function for a loss": (
        lambda: Preconditioner(model, untyped(nn.functional.cross_entropy), kl_clip=None),
        UnsupportedModel,
        "cross_entropy does not say.*PerSample",
    ),
    "another case": (lambda: make("KFAC"), Exception, "Did you mean 'kfac'"),
    "no structure": (
        lambda: make(untyped(nn.ReLU), sharing="reduce"),
        ValueError,
        r"A structure is a key such as 'kfac', a class, or an object such as KFAC\(\); got the class ReLU",
    ),
    "options of one that is made": (lambda: make(KFAC(), sharing="reduce"), ValueError, "takes no further options"),
    "a list of dampings": (
        lambda: KFAC().update(rows).solve(torch.ones(rows.P), untyped([1e-3])),
        ValueError,
        r"got \[0.001\]",
    ),
    "a data set to fit": (
        lambda: KFAC.fit(model, loss, untyped(loader.dataset)),
        ValueError,
        r"DataLoader\(data, batch_size",
    ),
    "a data set": (lambda: Hessian(model, loss, untyped(loader.dataset)), ValueError, r"DataLoader\(data, batch_size"),
    "a loader for inputs": (lambda: curvlab.sqrt_fisher(model, loss, loader, y), ValueError, r"next\(iter\(loader\)\)"),
    "an array": (lambda: curvlab.jacobian(model, x.numpy()), ValueError, r"torch.as_tensor\(inputs\)"),
    "targets in a list": (
        lambda: curvlab.sqrt_fisher(model, loss, x, y.tolist()),
        ValueError,
        r"torch.as_tensor\(targets\)",
    ),
    "a seed": (
        lambda: KFAC.fit(model, loss, (x, y), kind="mc", generator=untyped(1)),
        ValueError,
        r"torch.Generator\(\).manual_seed\(1\)",
    ),
    "a batch of three": (
        lambda: KFAC.fit(model, loss, untyped([(x, y, y)])),
        ValueError,
        "got a tuple of 3. Inputs may be",
    ),
    "a batch by name": (
        lambda: KFAC.fit(model, loss, untyped([{"x": x, "y": y}])),
        ValueError,
        "got a dict. .*make pairs",
    ),
    "a sample alone": (lambda: curvlab.jacobian(model, x[0]), UnsupportedModel, r"inputs\[None\] for a sample"),
    "a vector in a list": (
        lambda: KFAC().update(rows).solve(untyped([1.0]), 1.0),
        ValueError,
        "mapping by parameter name.*a list",
    ),
    "rows in a tuple": (
        lambda: KFAC().update(untyped((x, y))),
        ValueError,
        "not from a tuple; fit takes model and data",
    ),
    "a state of something else": (
        lambda: KFAC().load_state_dict({}),
        ValueError,
        "state of a None structure, not of 'kfac'",
    ),
    "a seed for a trace": (
        lambda: trace(hessian, products=4, generator=untyped(3)),
        ValueError,
        r"manual_seed\(3\), got 3",
    ),
    "a type by name": (
        lambda: curvlab.jacobian(model, x, dtype=untyped("float64")),
        ValueError,
        "torch.float64, got 'float64'",
    ),
    "a rate for a loss": (
        lambda: NaturalGradient(model, untyped(0.1), loss, kl_clip=None),
        UnsupportedModel,
        r"CrossEntropyLoss\(\), got a float",
    ),
    "eigenpairs of a structure": (
        lambda: eigenpairs(untyped(KFAC().update(rows))),
        ValueError,
        r"StructureOperator\(structure\)",
    ),
    "a trace of rows": (lambda: trace(untyped(rows)), ValueError, r"RowsOperator\(rows\)"),
    "a density of a matrix": (lambda: density(untyped(torch.eye(3))), ValueError, r"DenseOperator\(matrix\)"),
    "eigenpairs of a model": (lambda: eigenpairs(untyped(model)), ValueError, r"Hessian\(model, loss, data\)"),
    "half a pair": (
        lambda: eigenpairs(hessian, k=untyped(1.5)),
        ValueError,
        "k is a whole number of eigenpairs, got 1.5",
    ),
    "a key that preconditions": (
        lambda: Preconditioned(hessian, untyped("kfac")),
        ValueError,
        r"KFAC\(\).update\(rows\), got a str",
    ),
    "a nameless diagonal": (
        lambda: DiagonalPreconditioner(untyped(torch.ones(3))),
        ValueError,
        "mapping by parameter name",
    ),
    "a name for a partition": (lambda: block_map(hessian, untyped("layer")), ValueError, r"by_layer\(operator.space\)"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused_says_what_was_given_and_the_remedy(case: str) -> None:
    verb, error, message = REFUSED[case]
    with pytest.raises(error, match=message):
        verb()


class Decoder(nn.Module):
    """Logits `[N, T, V]`, as language models return them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table, self.head = nn.Embedding(7, 8).double(), nn.Linear(8, 7).double()

    def forward(self, tokens: Tensor) -> Tensor:
        logits: Tensor = self.head(torch.relu(self.table(tokens)))
        return logits


decoder = Decoder()
tokens, following = torch.randint(7, (4, 5)), torch.randint(7, (4, 5))
ON_LOGITS: dict[str, Callable[..., object]] = {
    "rows": lambda kind, **how: curvlab.sqrt_fisher(
        decoder, loss, tokens, following, kind=kind, generator=generator(), **how
    ),
    "a fit": lambda kind, **how: KFAC.fit(decoder, loss, (tokens, following), kind=kind, generator=generator(), **how),
    "Fisher": lambda kind, **how: Fisher(decoder, loss, (tokens, following), kind=kind, generator=generator(), **how),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("verb", ON_LOGITS)
def test_logits_with_the_classes_last_say_to_move_them_and_the_remedy_works(verb: str, kind: str) -> None:
    with pytest.raises(ValueError, match=r"\(4, 5, 7\).*move classes to axis 1.*output=lambda z: z.mT"):
        ON_LOGITS[verb](kind)
    ON_LOGITS[verb](kind, output=lambda z: z.mT)


@pytest.mark.parametrize("of", [Hessian, GGN])
def test_so_do_operators_that_differentiate_the_loss(of: Any) -> None:
    with pytest.raises(ValueError, match="move classes to axis 1"):
        of(decoder, loss, (tokens, following))
    of(decoder, loss, (tokens, following), output=lambda z: z.mT)


@pytest.mark.parametrize("kind", KINDS)
def test_so_does_a_training_step_where_torch_would_name_no_remedy(kind: str) -> None:
    natural = Preconditioner(decoder, loss, kind=kind, kl_clip=None)
    with pytest.raises(ValueError, match=r"move classes to axis 1.*loss\(outputs.mT, targets\)"), natural.collect():
        loss(decoder(tokens), following)
    with natural.collect():
        loss(decoder(tokens).mT, following).backward()
    natural.precondition()


@pytest.mark.parametrize(
    ("of", "targets", "message"),
    [
        (loss, y[:, None], r"one axis too many: pass targets.squeeze\(1\)"),
        (loss, y[:5], r"shape \(10,\), got \(5,\), for outputs \(10, 3\)"),
        (loss, y + CLASSES, "is neither one of the 3 classes nor ignore_index"),
        (loss, y.double(), "or class indices as integers"),
        (nn.MSELoss(), torch.zeros(30), r"targets.view_as\(outputs\)"),
        (nn.BCEWithLogitsLoss(), y, r"needs targets of the output's shape \(10, 3\), got \(10,\)"),
    ],
)
@pytest.mark.filterwarnings("ignore:Using a target size")
def test_targets_that_do_not_fit_say_so_alike_everywhere(of: nn.Module, targets: Tensor, message: str) -> None:
    verbs: list[Callable[[], object]] = [
        lambda: curvlab.sqrt_fisher(model, of, x, targets),
        lambda: KFAC.fit(model, of, (x, targets)),
        lambda: train(network(), x, targets, of=of),
        lambda: Fisher(model, of, (x, targets)),
        lambda: Hessian(model, of, (x, targets)),
    ]
    for verb in verbs:
        with pytest.raises(ValueError, match=message):
            verb()


def broken(tensor: Tensor) -> Tensor:
    """A copy with NaN in its third entry along the first axis."""
    copied = tensor.clone()
    copied[2] = torch.nan
    return copied


@pytest.mark.parametrize("kind", KINDS)
def test_inputs_that_are_not_finite_name_the_sample(kind: str) -> None:
    wrong = broken(x)
    with pytest.raises(ValueError, match="output is not finite, first at sample 2: check its inputs"):
        curvlab.sqrt_fisher(model, loss, wrong, y, kind=kind, generator=generator())  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="output is not, first at sample 2"):
        Hessian(model, loss, (wrong, y))
    with pytest.raises(FloatingPointError, match=r"in 4 steps in a row. The model's output is not, first at sample 2"):
        train(network(), wrong, y, steps=4, kind=kind)


def test_parameters_that_are_not_finite_are_named() -> None:
    spoilt = network()
    with torch.no_grad():
        spoilt[2].bias[0] = torch.nan  # type: ignore[index]
    with pytest.raises(FloatingPointError, match=r"2.bias of the model are not finite: begin again"):
        train(spoilt, x, y, steps=4)


def test_targets_that_are_not_finite_are_told_from_outputs_that_are_not() -> None:
    wrong = broken(torch.zeros(10, CLASSES, dtype=torch.float64))
    with pytest.raises(ValueError, match="The loss is not finite: the targets are not"):
        Hessian(model, nn.MSELoss(), (x, wrong))
    with pytest.raises(ValueError, match="The targets are not finite, first at sample 2"):
        train(network(), x, wrong, of=nn.MSELoss())


@pytest.mark.parametrize(
    "layer", [nn.BatchNorm1d(8, dtype=torch.float64), nn.Dropout(0.5)], ids=["normalisation", "dropout"]
)
def test_a_model_in_training_mode_is_told_to_leave_it_and_trains(layer: nn.Module) -> None:
    training = nn.Sequential(nn.Linear(6, 8), layer, nn.Linear(8, CLASSES)).double().train()
    verbs: list[Callable[[], object]] = [
        lambda: curvlab.sqrt_fisher(training, loss, x, y),
        lambda: curvlab.jacobian(training, x),
        lambda: curvlab.gram(training, x),
        lambda: KFAC.fit(training, loss, (x, y)),
        lambda: Fisher(training, loss, (x, y)),
        lambda: curvlab.linearize(training),
    ]
    for verb in verbs:
        with pytest.raises(UnsupportedModel, match=r"training mode.*Call model.eval\(\) first"):
            verb()
    train(training, x, y)


def test_another_loss_than_the_one_that_was_given_is_not_seen_and_the_message_says_why() -> None:
    natural = Preconditioner(model, loss, kl_clip=None)
    for other in (nn.CrossEntropyLoss(), nn.functional.cross_entropy):
        with pytest.raises(StateError, match="another object of its class, or its function"), natural.collect():
            other(model(x), y).backward()


def test_another_model_than_the_one_that_was_given_is_not_seen() -> None:
    natural = Preconditioner(model, loss, kl_clip=None)
    with pytest.raises(StateError, match="run the Sequential that was given, then call the loss"), natural.collect():
        loss(network()(x), y).backward()


def direction(batches: Iterable[tuple[Tensor, Tensor]], factor: float, **how: Any) -> Tensor:
    """Return what a step makes of the gradients of losses of batches times a factor, flat."""
    net = network()
    natural = Preconditioner(net, loss, kl_clip=None, **how)
    for inputs, targets in batches:
        with natural.collect():
            (factor * loss(net(inputs), targets)).backward()
    natural.precondition()
    return torch.cat([p.grad.flatten() for p in net.parameters() if p.grad is not None])


@pytest.mark.parametrize("kind", KINDS)
def test_a_factor_on_the_loss_scales_the_gradient_and_not_the_curvature(kind: str) -> None:
    quarter, whole = (direction([(x, y)], factor, structure="kfac", kind=kind) for factor in (0.25, 1.0))
    torch.testing.assert_close(quarter, whole / 4, rtol=1e-9, atol=1e-12)


def test_a_loss_divided_by_the_number_of_passes_takes_the_step_of_the_whole_batch() -> None:
    how = {"structure": "full", "kind": "exact", "damping": 1e-2}
    halves = zip(x.chunk(2), y.chunk(2), strict=True)
    torch.testing.assert_close(direction(halves, 0.5, **how), direction([(x, y)], 1.0, **how), rtol=1e-8, atol=1e-12)


def test_a_pass_without_gradients_is_no_pass() -> None:
    natural = Preconditioner(model, loss, kl_clip=None)
    message = "call the Sequential that was given in the context, with gradients on"
    with pytest.raises(StateError, match=message), natural.collect(), torch.no_grad():
        loss(model(x), y)
