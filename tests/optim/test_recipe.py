"""The blocks of the README that train, on the data for which the README says how they train."""

import os
import re
from pathlib import Path

import pytest
import torch
from torch import nn

from curvlab.problems import resolve

STEPS, BATCH = 78, 128
README = (Path(__file__).parents[2] / "README.md").read_text()
BLOCKS = [code for code in re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL) if "in loader:" in code]
LOADER = re.compile(r"\[\(x, y\)\] \* 20")


def test_two_blocks_train() -> None:
    assert len(BLOCKS) == 2
    assert len(LOADER.findall(BLOCKS[0])) == 1


@pytest.mark.skipif(not os.environ.get("CURVLAB_DATA"), reason="CURVLAB_DATA does not name a folder with the images")
@pytest.mark.parametrize("block", [0, 1])
def test_they_train_on_an_epoch_of_real_batches(block: int) -> None:
    """From chance, which is a loss of 2.3."""
    images, labels = resolve("fashion-lenet").to("cpu", torch.float32).train
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(784, 256), nn.ReLU(), nn.Linear(256, 10))
    order = torch.randperm(len(images))[: STEPS * BATCH].split(BATCH)
    batches = [(images[batch], labels[batch]) for batch in order]
    loss = nn.CrossEntropyLoss()
    exec(
        LOADER.sub("batches", BLOCKS[block]),
        {"torch": torch, "model": model, "loss": loss, "batches": batches, "loader": batches},
    )
    with torch.no_grad():
        assert float(loss(model(images[:2000]), labels[:2000])) < 0.45
