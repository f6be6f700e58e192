"""What every analysis says of a problem that does not exist, or whose data are absent."""

import importlib
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest
import torch
from torch import nn

from curvlab.problems import Problem, data_hash, digest_of
from curvlab.study.runner import main

GENERAL = ("block_structure", "edge_of_stability", "jacobian_rank", "ntk_isotropy", "spectrum", "training")
GRAPHS = ("gnn_acceleration", "gnn_natural_gradient")


def run(name: str, problem: str, tmp_path: Path, *options: str) -> int:
    analysis = import_module(f"analyses.{name}.analysis").ANALYSIS
    return main(analysis, ["--problem", problem, "--results", str(tmp_path), *options])


@pytest.mark.parametrize("name", [*GENERAL, *GRAPHS])
def test_an_unknown_problem_is_wrong_usage(name: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert run(name, "digitz", tmp_path) == 2
    text = capfd.readouterr()
    assert "problem" in text.err + text.out
    assert name in GRAPHS or "Did you mean 'digits'" in text.err


@pytest.mark.parametrize("name", GENERAL)
def test_absent_data_are_named(
    name: str, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "absent_data.py").write_text(
        "from curvlab.problems import DataUnavailable\n\n\n"
        "def problem(width: int = 8, depth: int = 2, seed: int = 0):\n"
        '    raise DataUnavailable("The images are not there; fetch them.")\n'
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert run(name, "absent_data:problem", tmp_path) == 3
    assert "The images are not there; fetch them." in capfd.readouterr().err


@pytest.mark.parametrize("name", [name for name in GENERAL if name != "ntk_isotropy"])
def test_a_network_that_not_every_width_fits(name: str, tmp_path: Path) -> None:
    """The width of a transformer is a multiple of its heads; no analysis may ask for another one by itself."""
    assert run(name, "characters", tmp_path, "--dry-run") == 0


OWN = """
import torch
from torch import nn
from curvlab.nn import HalfSquaredError
from curvlab.problems import Problem


class Net(nn.Sequential):
    def forward(self, x):
        return super().forward(x) * 1.0


def made(loss, targets, width=8, gain=1.0):
    torch.manual_seed(0)
    x = torch.randn(6, 5).double()
    net = Net(nn.Linear(5, width), nn.Tanh(), nn.Linear(width, 3)).double()
    with torch.no_grad():
        net[0].weight.mul_(gain)
    return Problem("own", net, loss, (x, targets), (x, targets))


def classes(width=8, seed=0):
    return made(nn.CrossEntropyLoss(), torch.arange(6) % 3, width)


def mean_squared(width=8, seed=0):
    return made(nn.MSELoss(), torch.zeros(6, 3).double(), width)


def half_squared(width=8, seed=0):
    return made(HalfSquaredError(), torch.zeros(6, 3).double(), width)


def summed(width=8, seed=0):
    return made(HalfSquaredError("sum"), torch.zeros(6, 3).double(), width)


def either(width=8, seed=0, loss="cross-entropy"):
    return half_squared(width) if loss == "half-squared" else classes(width)


def unseeded():
    x = torch.zeros(4, 2)
    return Problem("unseeded", nn.Linear(2, 3), nn.CrossEntropyLoss(), (x, torch.arange(4) % 3), (x, torch.arange(4) % 3))
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A module of a user's own problems; its name is new in every test."""
    name = f"own_{tmp_path.name}".replace("-", "_")
    (tmp_path / f"{name}.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    yield name
    sys.modules.pop(name, None)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("nn.Tanh()", "nn.ReLU()"),
        ("* 1.0", "* 2.0"),
        ("gain=1.0", "gain=2.0"),
        ("nn.CrossEntropyLoss()", "nn.MultiMarginLoss()"),
        ("nn.CrossEntropyLoss()", "nn.CrossEntropyLoss(label_smoothing=0.1)"),
        ("nn.CrossEntropyLoss()", "nn.CrossEntropyLoss(torch.tensor([1.0, 2.0, 1.0]))"),
        ("randn(6, 5)", "randn(6, 5).abs()"),
    ],
)
def test_an_edited_problem_is_another_one(before: str, after: str, own: str, tmp_path: Path) -> None:
    first, again = data_hash(f"{own}:classes"), data_hash(f"{own}:classes")
    assert first == again
    path = tmp_path / f"{own}.py"
    path.write_text(OWN.replace(before, after) + "# of another length\n")
    sys.modules.pop(own)
    importlib.invalidate_caches()
    assert data_hash(f"{own}:classes") != first


def test_shapes_and_types_of_data_are_part_of_a_problem() -> None:
    def of(inputs: torch.Tensor) -> str:
        data = (inputs, torch.zeros(len(inputs), dtype=torch.long))
        return digest_of(Problem("zeros", nn.Identity(), nn.CrossEntropyLoss(), data, data))

    shapes = [
        torch.zeros(4, 6),
        torch.zeros(4, 3, 2),
        torch.zeros(4, 3, dtype=torch.float64),
        torch.zeros(4, 6).bfloat16(),
    ]
    assert len({of(inputs) for inputs in shapes}) == len(shapes)


def test_a_problem_without_a_seed_is_found_again_and_draws_nothing(own: str) -> None:
    before = torch.get_rng_state()
    assert data_hash(f"{own}:unseeded") == data_hash(f"{own}:unseeded")
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("name", ["jacobian_rank", "ntk_isotropy"])
def test_other_widths_keep_the_cached_cells(name: str) -> None:
    analysis = import_module(f"analyses.{name}.analysis").ANALYSIS
    problem = "two-layer" if name == "jacobian_rank" else "digits"
    hashes = {analysis.data_hash(analysis.config(problem=problem, widths=widths)) for widths in ((8,), (16, 32))}
    assert len(hashes) == 1


@pytest.mark.parametrize("function", ["mean_squared", "classes", "summed"])
def test_the_isotropy_analysis_refuses_a_loss_that_its_theory_does_not_cover(
    function: str, own: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run("ntk_isotropy", f"{own}:{function}", tmp_path) == 2
    error = capfd.readouterr().err
    assert "Hessian" in error
    assert "curvlab.nn.HalfSquaredError" in error
    assert {"mean_squared": "MSELoss", "classes": "CrossEntropyLoss", "summed": "HalfSquaredError"}[function] in error


@pytest.mark.parametrize("function", ["half_squared", "either"])
def test_the_isotropy_analysis_takes_a_half_squared_error(function: str, own: str, tmp_path: Path) -> None:
    assert run("ntk_isotropy", f"{own}:{function}", tmp_path, "--dry-run") == 0


def test_races_need_classes(own: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert run("training", f"{own}:half_squared", tmp_path) == 2
    assert "races need classes" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("name", "options", "named"),
    [
        ("jacobian_rank", ("--activation",), "--activation needs at least one value"),
        ("jacobian_rank", ("--activation", "relu", "relu"), "--activation names relu 2 times"),
        ("spectrum", ("--structures", "kfac", "kfac"), "--structures names kfac 2 times"),
        ("edge_of_stability", ("--samples", "10000000"), "--samples 10000000"),
        ("ntk_isotropy", ("--step-scales", "nan"), "--step-scales must be finite"),
    ],
)
def test_wrong_options_are_named(
    name: str, options: tuple[str, ...], named: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    analysis = import_module(f"analyses.{name}.analysis").ANALYSIS
    assert main(analysis, [*options, "--dry-run", "--results", str(tmp_path)]) == 2
    text = capfd.readouterr()
    assert named in text.err + text.out
