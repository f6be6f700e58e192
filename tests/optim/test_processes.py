"""Two processes, each with half of every batch, against one with all of it."""

from pathlib import Path

import pytest
import torch
from natural_gradients import STRUCTURES
from shared_training import ADAPTED, train
from torchrun import run

from curvlab.rows.processes import Processes, spread
from curvlab.testing.oracle import assert_close


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, torch.Tensor]]:
    file = tmp_path_factory.mktemp("shared") / "parameters"
    return run(Path(__file__).parent / "shared_training.py", 2, file)


@pytest.fixture(scope="module")
def alone() -> dict[str, torch.Tensor]:
    return train()


@pytest.mark.parametrize("name", [*STRUCTURES, *ADAPTED])
def test_two_processes_end_where_one_does(
    name: str, trained: list[dict[str, torch.Tensor]], alone: dict[str, torch.Tensor]
) -> None:
    first, second = (found[name] for found in trained)
    assert torch.equal(first, second)
    assert_close(first, alone[name], 1e-9)


def test_one_process_has_no_others() -> None:
    assert Processes.present() is None


def test_the_dearest_inverses_are_spread_first() -> None:
    assert spread([1, 8, 8, 27], 2) == [1, 1, 1, 0]
    assert spread([5], 3) == [0]
    assert spread([], 2) == []
