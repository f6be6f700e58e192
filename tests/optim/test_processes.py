"""Two processes, each with half of every batch, against one with all of it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from shared_training import structures, train

from curvlab.optim.processes import Processes, _spread
from curvlab.testing.oracle import assert_close


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, torch.Tensor]]:
    file = tmp_path_factory.mktemp("shared") / "parameters"
    script = Path(__file__).parent / "shared_training.py"
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node=2",
        str(script),
        str(file),
    ]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=300, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr
    return [torch.load(f"{file}.{rank}", weights_only=True) for rank in range(2)]


@pytest.fixture(scope="module")
def alone() -> dict[str, torch.Tensor]:
    return train()


@pytest.mark.parametrize("name", [name for name, _, _ in structures()])
def test_two_processes_end_where_one_does(
    name: str, trained: list[dict[str, torch.Tensor]], alone: dict[str, torch.Tensor]
) -> None:
    first, second = (found[name] for found in trained)
    assert torch.equal(first, second)
    assert_close(first, alone[name], 1e-9)


def test_one_process_has_no_others() -> None:
    assert Processes.present() is None


def test_the_dearest_inverses_are_spread_first() -> None:
    assert _spread([1, 8, 8, 27], 2) == [1, 1, 1, 0]
    assert _spread([5], 3) == [0]
    assert _spread([], 2) == []
