"""Options, configuration files and their errors."""

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import dummy_analysis
import pytest

from curvlab.study import CommonOptions, UsageError
from curvlab.study.options import parse, pop_option, read_config, recorded, share


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
    window=(1.0, 2.0),
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
    assert read_config(Options, path) == config
    assert command_line(Options(), "--config", str(path)) == replace(config, config=path)
    overridden = command_line(Options(), "--seeds", "9", f"--config={path}", "--widths", "1", "2")
    assert overridden == replace(config, config=path, seeds=9, widths=(1, 2))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"widht": 3}', "Unknown entry of options 'widht'. Did you mean 'widths'"),
        ('{"widths": 3}', r"widths = 3 is not of type tuple\[int, ...\]"),
        ('{"widths": [1.5]}', "widths = 1.5 is not of type int"),
        ('{"window": [1, 2, 3]}', "window = "),
        ('{"seeds": true}', "seeds = True is not of type int"),
        ('{"activation": "tanh"}', "activation = 'tanh'"),
        ('{"damping": "none"}', "damping = 'none'"),
        ('{"training": {"step": 3}}', "Did you mean 'steps'"),
        ('{"damping": NaN}', "--damping must be finite, got nan"),
        ('{"window": [0.0, Infinity]}', "--window must be finite, got inf"),
        ('{"seeds": 0}', "--seeds must be at least 1"),
        ("[1]", r"options = \[1\]"),
        ("{", "is not JSON"),
    ],
)
def test_errors_in_a_configuration_file_name_the_entry(tmp_path, content, message):
    path = tmp_path / "config.json"
    path.write_text(content)
    with pytest.raises(UsageError, match=message) as error:
        read_config(Options, path)
    assert str(path) in str(error.value)


def test_a_missing_configuration_file(tmp_path):
    with pytest.raises(UsageError, match="cannot be read"):
        read_config(Options, tmp_path / "none.json")


def test_an_unknown_option_suggests_the_nearest(capsys):
    with pytest.raises(SystemExit) as stop:
        command_line(Options(), "--widht", "3")
    assert stop.value.code == 2
    assert "--widths" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments", [["--seeds", "0"], ["--shard", "0/2"], ["--shard", "3/2"], ["--shard", "x"], ["--damping", "nan"]]
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
