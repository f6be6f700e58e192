"""Every public object says what it is in one line, whatever its size, and in a notebook by a table or a figure."""

import re
from collections.abc import Iterator
from inspect import isabstract, isclass
from typing import Any, is_typeddict
from xml.etree import ElementTree

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import curvlab
from curvlab import fisher, optim, spectrum
from curvlab.tools.shown import MOST_ROWS, WIDTH, changed, line, shown, some, table

LAYERS = 30


class Named(nn.Module):
    """Layers under long names."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        for i in range(LAYERS):
            self.add_module(f"a_rather_long_name_of_layer_{i}", nn.Linear(3, 3, dtype=torch.float64))
        self.add_module("norm", nn.LayerNorm(3, dtype=torch.float64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.children():
            x = layer(x)
        return x


def instances() -> Iterator[Any]:
    """An object of every public class, on a network with many layers, and those of ours that are reached from them."""
    model, loss = Named(), nn.CrossEntropyLoss()
    x, y = torch.randn(4, 3, dtype=torch.float64), torch.tensor([0, 1, 2, 0])
    rows = curvlab.sqrt_fisher(model, loss, x, y)
    yield from (rows, rows.jacobian(), rows.space, rows.layers[0], fisher.STRUCTURES)
    structures = [fisher.make(key) for key in fisher.STRUCTURES]
    structures += [fisher.KFAC(sharing="reduce", factored_damping=True, max_block=2, max_factor=2, rtol=1e-9)]
    structures += [
        fisher.BlockDiagonal(partition=[list(rows.space.shapes)]),
        fisher.LayerWise(lambda size: torch.eye(size)),
    ]
    names = [f"a_rather_long_name_of_layer_{i}" for i in range(LAYERS)]
    structures += [fisher.PerLayer({**dict.fromkeys(names, fisher.EKFAC()), "*": "diagonal"})]
    for structure in structures:
        yield structure
        yield structure.update(rows)
    vector = rows.rmatvec(torch.ones(rows.R, dtype=torch.float64))
    yield structures[0].solve(vector, 1e-3, info=True)[1]
    yield fisher.from_optimizer(torch.optim.SGD(model.parameters(), 0.1), model)
    kfac = fisher.KFAC().update(rows)
    hessian = spectrum.Hessian(model, loss, (x, y))
    ones = {name: torch.ones_like(p) for name, p in model.named_parameters()}
    yield from (hessian, spectrum.GGN(model, loss, (x, y)), spectrum.Fisher(model, loss, (x, y)))
    yield from (spectrum.RowsOperator(rows), spectrum.StructureOperator(kfac), spectrum.DenseOperator(torch.eye(3)))
    yield from (spectrum.DiagonalPreconditioner(ones), spectrum.Preconditioned(hessian, kfac, damping=1e-2))
    measured = spectrum.density(hessian, probes=2, steps=8)
    yield from (measured, measured.probes[0], spectrum.trace(hessian), spectrum.diagonal(hessian))
    yield from (spectrum.rank(rows), spectrum.eigenpairs(hessian, k=12))
    yield from (spectrum.by_unit(rows.space), spectrum.rows_block_map(rows))
    yield curvlab.compare(model, loss, (x, y), "diagonal", damping=0.1, steps=0)
    yield curvlab.advise(model, loss, (x, y), 0.1, candidates=[curvlab.advice.Candidate("SGD", {"lr": 0.1})])
    natural = optim.NaturalGradient(
        model,
        loss,
        lambda step: 0.1,
        structure=structures[-1],
        damping=optim.LevenbergMarquardt(),
        kl_clip=1e-3,
        plain=names[1:],
        momentum=0.9,
        nesterov=True,
    )
    yield from (natural, natural.preconditioner, optim.ByLayer(natural), optim.LevenbergMarquardt())


def public_classes() -> set[type]:
    """Classes of results and objects that users hold; errors, warnings and what has no objects of its own are left out."""
    named = [vars(module)[name] for module in (curvlab, fisher, optim, spectrum) for name in module.__all__]
    left_out = (BaseException,)
    classes = {one for one in named if isclass(one) and not issubclass(one, left_out) and not isabstract(one)}
    return {one for one in classes if not getattr(one, "_is_protocol", False) and not is_typeddict(one)}


@pytest.fixture(scope="module")
def drawn() -> list[Any]:
    return list(instances())


def test_there_is_an_object_of_every_public_class(drawn: list[Any]) -> None:
    missing = {one.__name__ for one in public_classes()} - {type(thing).__name__ for thing in drawn}
    assert not missing, f"add objects of {missing} to instances()"


def test_every_public_object_shows_itself_in_one_line(drawn: list[Any]) -> None:
    for thing in drawn:
        text = repr(thing)
        assert len(text) <= WIDTH, text
        assert "\n" not in text, text
        assert " object at 0x" not in text, text


def test_pages_are_well_formed_and_short_and_hold_the_line(drawn: list[Any]) -> None:
    pages = [(thing, thing._repr_html_()) for thing in drawn if hasattr(thing, "_repr_html_")]
    assert {type(thing).__name__ for thing, _ in pages} >= {"Rows", "KFAC", "Eigenpairs", "Density", "BlockMap"}
    for thing, page in pages:
        text = "".join(ElementTree.fromstring(page).itertext())
        assert repr(thing) in text
        assert len(page) < 20_000
        assert page.count("<tr>") <= MOST_ROWS + 2


def test_the_line_of_eigenpairs_holds_the_headline() -> None:
    found = spectrum.eigenpairs(
        spectrum.DenseOperator(torch.diag(torch.tensor([4.4811, 2.5623, 1.0, 0.5]).double())), k=2
    )
    assert re.fullmatch(
        r"Eigenpairs\(k=2, values=\[4\.481, 2\.562\]; residuals ≤ \S+; converged; \d+ products\)", repr(found)
    )


def test_a_fitted_choice_per_layer_names_layers_and_no_templates() -> None:
    model, loss = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 3)), nn.CrossEntropyLoss()
    structure = fisher.PerLayer({"2": fisher.Diagonal(rtol=1e-3), "*": fisher.EKFAC()})
    assert repr(structure) == "PerLayer(not updated yet; '2': Diagonal(rtol=0.001), '*': EKFAC())"
    structure.update(curvlab.sqrt_fisher(model, loss, torch.randn(5, 3), torch.randint(3, (5,))))
    assert repr(structure) == "PerLayer(P=31, blocks=2; ekfac: 0; diagonal: 2)"


class Thing:
    def __init__(self, size: int = 3) -> None:
        self.size = size

    def __repr__(self) -> str:
        return line(self, size=self.size)


@given(st.dictionaries(st.text("ab", min_size=1), st.text() | st.floats() | st.lists(st.floats())), st.lists(st.text()))
def test_no_figure_and_no_note_makes_a_line_longer_than_the_width(figures: dict[str, Any], notes: list[str]) -> None:
    text = line(Thing(), *notes, **figures)
    assert len(text) <= WIDTH
    assert text.startswith("Thing(")
    assert text.endswith(")")


def test_values_are_shown_by_what_matters() -> None:
    assert shown(0.123456) == "0.1235"
    assert shown(torch.tensor(2.0)) == "2"
    assert shown(torch.tensor([1.0, 2.5])) == "[1, 2.5]"
    assert shown(torch.arange(9)) == "[0, 1, 2, … 9 in all]"
    assert shown(torch.zeros(2, 3)) == "2 × 3 float32"
    assert shown({"a": 1.0}) == "{a: 1}"
    assert shown(public_classes) == "public_classes"
    assert some("abcdef") == "a, b, c, … 6 in all"
    assert changed(Thing(), {"size": 3}) == {}
    assert changed(Thing(), {"size": 4}) == {"size": 4}


def test_tables_escape_what_is_no_text_of_theirs_and_say_how_many_rows_are_left() -> None:
    page = table(Thing(), ("<b>",), [["<i>"]] * (MOST_ROWS + 5))
    assert "<b>" not in page
    assert "<i>" not in page
    assert "… 5 more" in page
