"""Which structures are compared, and which arguments are refused."""

import pytest
import torch
from comparison_cases import LOSSES, X, small_model
from torch import nn

import curvlab
from curvlab.fisher import KFAC, STRUCTURES, BlockDiagonal, Diagonal, Full, of_theory


def test_structures_of_the_user_and_other_kinds() -> None:
    loss, y = LOSSES["cross-entropy"]
    halves = BlockDiagonal(partition=[["0.weight", "0.bias", "2.weight"], ["2.bias", "4.weight", "4.bias"]])
    generator = torch.Generator().manual_seed(0)
    structures = {"two blocks": halves, "exact": Full()}
    table = curvlab.compare(small_model(), loss, (X, y), structures, kind="mc", generator=generator).table
    assert table["structure"].unique().tolist() == ["two blocks", "exact"]
    assert (table.loc[table["structure"] == "exact", "anisotropy"] > 1e-3).all(), (
        "rows of one draw are not the exact ones"
    )
    assert not halves.updated, "structures of the user stay as they are"


@pytest.mark.parametrize("given", ["kfac", KFAC(), ["kfac"], [KFAC()], {"kfac": KFAC()}])
def test_one_structure_and_one_damping_need_no_list(given: object) -> None:
    loss, y = LOSSES["mse"]
    table = curvlab.compare(small_model(4), loss, (X, y), given, 1.0, steps=0).table
    assert table[["structure", "damping"]].to_numpy().tolist() == [["kfac", 1.0]]


def test_all_structures_of_theory_that_there_are_by_then_are_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that a user has registered since curvlab was imported, too."""
    loss, y = LOSSES["mse"]
    monkeypatch.setitem(STRUCTURES._things, "mine", Diagonal)
    table = curvlab.compare(small_model(4), loss, (X, y), damping=[1.0], steps=0).table
    assert table["structure"].tolist() == [*of_theory()]
    assert "mine" in of_theory()
    assert "sketched" not in of_theory()
    assert "rank-one" not in of_theory()


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
        ({"data": "digits"}, "data is a pair .* got a str"),
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
        curvlab.compare(small_model(4), loss, **{"data": (X, y)} | arguments)


def test_a_fisher_matrix_of_zero_is_refused() -> None:
    model = nn.Linear(10, 1).double()
    with pytest.raises(ValueError, match=r"The exact Fisher matrix of Linear and CrossEntropyLoss .* is zero"):
        curvlab.compare(model, nn.CrossEntropyLoss(), (X, torch.zeros(12, dtype=torch.long)), ["full", "kfac"])


def test_a_structure_of_rows_of_zero_is_named() -> None:
    model = small_model()
    with pytest.raises(ValueError, match=r"The structure 'kfac' of rows of kind 'empirical' is zero"):
        curvlab.compare(model, nn.MSELoss(), (X, model(X).detach()), ["kfac"], kind="empirical", steps=0)
