"""Every block of the page on frameworks trains on real data, and its loss falls."""

import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

PAGE = (Path(__file__).parents[2] / "docs" / "training_frameworks.md").read_text()
BLOCKS = dict(re.findall(r"^## ([^\n]+)\n(?:(?!^## ).)*?```py(?:thon)?\n(.*?)```", PAGE, re.M | re.S))


def test_every_block_is_found() -> None:
    assert len(BLOCKS) == len(re.findall(r"^```py", PAGE, re.M)) == 5


@pytest.mark.filterwarnings("ignore")  # frameworks warn of loaders, loggers and deprecations
@pytest.mark.parametrize("heading", BLOCKS)
def test_its_loss_falls(heading: str, transformers: Any) -> None:
    if "lightning" in BLOCKS[heading] and find_spec("lightning") is None:
        pytest.skip("lightning is not installed: pip install curvlab[lightning]")
    torch.manual_seed(0)
    names: dict[str, Any] = {}
    first, *_ = BLOCKS.values()
    for code in dict.fromkeys([first, BLOCKS[heading]]):
        exec(compile(code, heading, "exec"), names)
    losses = names["losses"]
    assert len(losses) > 15
    assert sum(losses[-4:]) < 0.6 * sum(losses[:4])
