"""Options, configuration files and their errors."""

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import dummy_analysis
import pytest

from curvlab.study import CommonOptions, UsageError
from curvlab.study.options import parse, pop_option, recorded, share


@dataclass(frozen=True)
class Training:
    """A nested group of options."""

    rate: float = 0.1
    steps: int = 5


@dataclass(frozen=True, kw_only=True)
class Options(CommonOptions):
    """One option of every kind."""

    problem: str = "digits"
    widths: tuple[int, ...] = (128, 512)
    window: tuple[float, float] = (0.0, 1.0)
    damping: float | Literal["auto"] = "auto"
    activation: Literal["relu", "erf"] = "relu"
    bias: bool = True
    data: Path = Path("data")
    limit: int | None = None
    training: Training = field(default_factory=Training)


CHANGED = Options(
    problem="mnist",
    seeds=3,
    claims=("A", "B"),
    widths=(8,),
    window=(-1.0, 2.0),
    damping=1e-3,
    activation="erf",
    bias=False,
    data=Path("elsewhere"),
    limit=7,
    training=Training(0.5, 2),
)


def command_line(defaults, *arguments):
    return parse(defaults, arguments, prog="prog", description="What it does.")


@pytest.mark.parametrize("config", [Options(), CHANGED])
def test_the_recorded_configuration_can_be_fed_back(tmp_path, config):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(recorded(replace(config, quiet=True, strict=True, results=Path("r")))))
    assert command_line(Options(), "--config", str(path)) == replace(config, config=path)
    overridden = command_line(Options(), "--seeds", "9", f"--config={path}", "--widths", "1", "2")
    assert overridden == replace(config, config=path, seeds=9, widths=(1, 2))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"widht": 3}', "--widths"),
        ('{"widths": [1.5]}', "Error parsing --widths"),
        ('{"window": [1, 2, 3]}', "Unrecognized options: 3"),
        ('{"seeds": true}', "Missing value for argument '--seeds'"),
        ('{"activation": "tanh"}', "'--activation'"),
        ('{"damping": "none"}', "Error parsing --damping"),
        ('{"training": {"step": 3}}', "--training.steps"),
        ('{"damping": NaN}', "--damping must be finite, got nan"),
        ('{"window": [0.0, Infinity]}', "--window must be finite, got inf"),
        ('{"seeds": 0}', "--seeds must be at least 1"),
    ],
)
def test_errors_in_a_configuration_file_name_the_entry(tmp_path, monkeypatch, capsys, content, message):
    monkeypatch.chdir(tmp_path)
    Path("config.json").write_text(content)
    with pytest.raises(SystemExit) as stop:
        command_line(Options(), "--config", "config.json")
    assert stop.value.code == 2
    printed = capsys.readouterr().err
    assert message in printed
    assert "prog --config config.json" in printed


@pytest.mark.parametrize(
    ("content", "message"), [("[1]", "holds no options"), ("{", "is not JSON"), (None, "cannot be read")]
)
def test_a_file_that_is_no_configuration(tmp_path, content, message):
    path = tmp_path / "config.json"
    if content:
        path.write_text(content)
    with pytest.raises(UsageError, match=message) as error:
        command_line(Options(), "--config", str(path))
    assert str(path) in str(error.value)


def test_an_unknown_option_suggests_the_nearest(capsys):
    with pytest.raises(SystemExit) as stop:
        command_line(Options(), "--widht", "3")
    assert stop.value.code == 2
    assert "--widths" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [
        ["--seeds", "0"],
        ["--seeds", "many"],
        ["--first-seed", "-1"],
        ["--shard", "0/2"],
        ["--shard", "3/2"],
        ["--shard", "x"],
        ["--damping", "nan"],
    ],
)
def test_options_outside_their_range(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        command_line(Options(), *arguments)
    assert stop.value.code == 2
    assert arguments[0] in capsys.readouterr().err


def test_share_and_pop_option():
    assert share("2/4") == (2, 4)
    assert pop_option("shard", ["--seeds", "3", "--shard", "1/2", "--claims", "A", "B"]) == (
        "1/2",
        ["--seeds", "3", "--claims", "A", "B"],
    )
    assert pop_option("shard", ["--shard=1/2"]) == ("1/2", [])
    assert pop_option("shard", ["--quiet"]) == (None, ["--quiet"])


def test_every_option_of_an_analysis_has_a_default_and_axes_are_options():
    with pytest.raises(ValueError, match="needs a default for problem"):
        replace(dummy_analysis.ANALYSIS, config=CommonOptions)
    with pytest.raises(ValueError, match="axes widths are no options"):
        replace(dummy_analysis.ANALYSIS, axes=("widths",))
    with pytest.raises(ValueError, match="called like a module"):
        replace(dummy_analysis.ANALYSIS, name="two words")


def test_seeds_that_are_run():
    assert Options().seeds_run == range(1000, 1012)
    assert Options(seeds=3, first_seed=7).seeds_run == range(7, 10)
    assert command_line(Options(), "--seeds", "auto").seeds_run == range(1000, 1048)
