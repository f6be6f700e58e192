"""The commands on the page of machines are understood."""

import re
import shlex
from importlib import import_module
from pathlib import Path

import pytest

from curvlab.study.executors import EXECUTORS
from curvlab.study.options import parse, settings

PAGE = (Path(__file__).parents[2] / "docs" / "machines.md").read_text()
COMMANDS = [line for block in re.findall(r"```sh\n(.*?)```", PAGE, flags=re.DOTALL) for line in block.splitlines()]
TABLE = re.findall(r"^\| `(\w+)` \|", PAGE, flags=re.MULTILINE)


@pytest.mark.parametrize("line", COMMANDS)
def test_a_command_names_an_executor_and_settings_that_there_are(line):
    _, _, module, *arguments = shlex.split(line)
    analysis = import_module(module).ANALYSIS
    config = parse(analysis.defaults, arguments, prog=analysis.command, description="")
    assert config.executor in EXECUTORS
    assert len(settings(config)) == len(config.executor_options)


def test_the_table_names_every_executor_of_ours():
    assert list(EXECUTORS) == TABLE
