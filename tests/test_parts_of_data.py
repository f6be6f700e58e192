"""Fits and products in several processes, each with a part of the data, against one process with all of it."""

import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from parts_of_data import FITS, fitted, products
from torchrun import run

from curvlab.testing.oracle import assert_close

SCRIPT = Path(__file__).parent / "parts_of_data.py"
FEW = ["kfac", "ekfac", "diagonal", "component-wise", "partial-traces", "partial-traces-diagonal", "full"]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run(SCRIPT, 2, tmp_path_factory.mktemp("parts") / "found", *FEW)


def assert_same(of_process: dict[str, Any], alone: dict[str, Any]) -> None:
    assert of_process["count"] == pytest.approx(alone["count"])
    assert_close(of_process["matrix"], alone["matrix"], 1e-9)
    assert_close(of_process["solution"], alone["solution"], 1e-9)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("name", FEW)
def test_parts_add_up_to_what_one_process_fits(name: str, reduction: str, found: list[dict[str, Any]]) -> None:
    for of_process in found:
        assert_same(of_process[f"{name} {reduction} plain"], fitted(name, reduction))


@pytest.mark.parametrize("kind", ["averaged", "sharded"])
def test_models_of_distributed_training_are_fitted_as_they_are(kind: str, found: list[dict[str, Any]]) -> None:
    for of_process in found:
        assert_same(of_process[f"kfac mean {kind}"], fitted("kfac", "mean"))


def test_products_add_up(found: list[dict[str, Any]]) -> None:
    alone = products()
    for of_process in found:
        for kind in ("plain", "sharded"):
            for name, matrix in alone.items():
                assert_close(of_process["products"][kind][name], matrix, 1e-9)


def test_a_failure_in_one_process_ends_the_others_with_its_message(found: list[dict[str, Any]]) -> None:
    first, second = (of_process["failing"] for of_process in found)
    assert first.startswith("StateError: Process 1 has failed. ValueError")
    assert second.startswith("ValueError: A batch is a pair")


def test_a_process_that_is_killed_ends_the_others_with_a_message(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    script, said = Path(__file__).parent / "ending_process.py", tmp_path / "said"
    command = [sys.executable, str(script), str(said)]
    ranks = [subprocess.Popen([*command, str(rank), str(port)], stderr=subprocess.DEVNULL) for rank in range(2)]
    started = time.monotonic()
    assert [rank.wait(timeout=120) for rank in ranks] == [0, -signal.SIGKILL]
    assert time.monotonic() - started < 50
    assert "A process has ended" in said.read_text()


@pytest.mark.study
@pytest.mark.parametrize("processes", [2, 3])
def test_parts_of_every_structure_add_up(processes: int, tmp_path: Path) -> None:
    for of_process in run(SCRIPT, processes, tmp_path / "found", *FITS):
        for name in FITS:
            for reduction in ("mean", "sum"):
                assert_same(of_process[f"{name} {reduction} plain"], fitted(name, reduction))
