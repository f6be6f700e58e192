"""The checks' benchmark: its networks are known again, and its command line."""

import json
from typing import Any

import pytest
import torch

from benchmarks.checks.__main__ import main
from benchmarks.checks.networks import NETWORKS
from benchmarks.checks.worker import Request, measure, training_step
from curvlab.rows import collect


@pytest.mark.parametrize("network", NETWORKS)
def test_networks_are_known_again(network: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[int] = []
    compare = collect.compare_with_reverse_pass

    def note(*args: Any, **kwargs: Any) -> Any:
        compared.append(1)
        return compare(*args, **kwargs)

    monkeypatch.setattr(collect, "compare_with_reverse_pass", note)
    torch.manual_seed(0)
    step = training_step(Request(network=network, samples=4, repeats=1, seconds=1.0, threads=1, device="cpu"))
    for _ in range(3):
        step()
    assert len(compared) == 1


def test_comparing_takes_longer_than_knowing(tmp_path: Any) -> None:
    request = Request(network="mlp", samples=8, repeats=3, seconds=10.0, threads=1, device="cpu")
    found = measure(request, tmp_path)
    assert 0 < found.checks < found.compared_checks < found.compared_seconds


def test_the_command_writes_shares(tmp_path: Any, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "checks.json"
    options = ["--networks", "lenet", "--samples", "4", "--repeats", "1", "--threads", "1", "--output", str(output)]
    assert main(options) == 0
    printed = capsys.readouterr().out
    assert "LeNet on 28×28 images" in printed
    assert "share" in printed
    (entry,) = json.loads(output.read_text())["measurements"]
    assert 0 < entry["measurement"]["checks"] < entry["measurement"]["seconds"]
