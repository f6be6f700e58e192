"""The benchmark of language models: decoders, that all libraries compute the same, and the command line."""

import importlib.util
import json

import pytest
import torch
from torch import nn

from benchmarks.language import __main__ as command
from benchmarks.language.__main__ import main
from benchmarks.language.methods import METHODS
from benchmarks.language.models import SHAPES, Shape
from benchmarks.language.worker import Request, measure
from curvlab.fisher import KFAC
from curvlab.fisher.factors import LinearBlock


def test_decoders_see_no_later_token():
    decoder, tokens, targets = SHAPES["tiny"].build("cpu")
    assert torch.equal(tokens[:, 1:], targets[:, :-1])
    later = tokens.clone()
    later[:, -1] = (later[:, -1] + 1) % 50
    before, after = (decoder(x).view(*tokens.shape, -1) for x in (tokens, later))
    assert torch.allclose(before[:, :-1], after[:, :-1])
    assert not torch.allclose(before[:, -1], after[:, -1])
    assert before.shape == (2, 8, 50)


def test_a_tied_decoder_has_one_table():
    decoder, *_ = Shape(1, 64, 50, 2, 8, tied=True).build("cpu")
    assert decoder.head.weight is decoder.tokens.weight


@pytest.mark.filterwarnings("ignore")
def test_libraries_factor_the_same_inputs():
    """A does not depend on the draws; with one weight a token it is the second moment of a layer's inputs."""
    decoder, tokens, targets = SHAPES["tiny"].build("cpu")
    generator = torch.Generator().manual_seed(0)
    data = (tokens, targets.flatten())
    fitted = KFAC.fit(decoder, nn.CrossEntropyLoss(), data, kind="mc", generator=generator)
    mine = {block.name: block.width.dense()[0] for block in fitted._blocks if isinstance(block, LinearBlock)}
    operator = METHODS["kfac-curvlinops"].prepare(decoder, tokens, targets)()
    peers = [list(operator._input_covariances.values())]
    if importlib.util.find_spec("kronfluence"):
        factors = METHODS["kfac-kronfluence"].prepare(decoder, tokens, targets)()
        peers.append(list(factors["activation_covariance"].values()))
    for theirs in peers:
        assert len(theirs) == len(mine) == 5
        for name, A in mine.items():
            scaled = [B / (B.trace() / A.trace()) for B in theirs if B.shape == A.shape]
            assert any(torch.allclose(A, B, atol=1e-5) for B in scaled), name


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("method", METHODS)
def test_every_method_is_measured(method, tmp_path):
    for name, package in {"kronfluence": "kronfluence", "eigenthings": "hessian_eigenthings"}.items():
        if name in method:
            pytest.importorskip(package, reason=f"{package} is not installed")
    asked = {"repeats": 2, "seconds": 60.0, "threads": 1, "device": "cpu"}
    found = measure(Request(method=method, model="tiny", **asked), tmp_path)
    assert found.outcome == "done"
    assert len(found.seconds) == 2
    assert min(*found.seconds, found.first) > 0


def test_the_command_writes_ratios(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(
        command, "in_own_process", lambda _worker, asked, _timeout, folder, _made: measure(asked, folder)
    )
    output = tmp_path / "language.json"
    options = ("--models", "tiny", "--methods", "kfac", "--repeats", "1", "--threads", "1")
    assert main([*options, "--output", str(output)]) == 0
    shown = capsys.readouterr().out
    assert "Decoder of 1 blocks of width 64, vocabulary 50, 2 × 8 tokens" in shown
    assert "1.00×" in shown
    ((plain, kfac),) = json.loads(output.read_text())["measurements"]
    assert [plain["request"]["method"], kfac["request"]["method"]] == ["plain", "kfac"]
