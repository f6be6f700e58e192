"""Every way of tracking against dense eigenpairs, what counts as wrong, and the command line, on a small network."""

import json
from dataclasses import asdict, replace

import pytest
import torch
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from benchmarks.tracking import methods, report
from benchmarks.tracking.__main__ import main
from benchmarks.tracking.course import RUNS, problem, record
from benchmarks.tracking.methods import METHODS, TOLERANCE, Counted
from benchmarks.tracking.runner import Entry
from benchmarks.tracking.worker import Measurement, Request, measure
from curvlab.spectrum import DenseOperator

RUN = replace(RUNS["digits"], samples=30, width=6, eta=0.3, steps=6, every=3)
TINY = Request(method="curvlab", course="", **asdict(RUN), repeats=2, seconds=1.0, threads=1, device="cpu")


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("warm", [False, True])
def test_methods_find_the_dense_eigenpairs(name, warm):
    generator = torch.Generator().manual_seed(0)
    Q = torch.linalg.qr(torch.randn(60, 60, dtype=torch.float64, generator=generator))[0]
    operator = Counted(DenseOperator((Q * torch.logspace(1, -2, 60, dtype=torch.float64)) @ Q.T))
    noise = 0.1 * torch.randn(2, 60, dtype=torch.float64, generator=generator)
    found = METHODS[name].find(operator, 2, torch.nn.functional.normalize(Q.T[:2] + noise, dim=1) if warm else None)
    residuals = (operator.operator.matmat(found.vectors) - found.values[:, None] * found.vectors).norm(dim=1)
    allowed = 1.01 if METHODS[name].bounded else 3
    assert bool((residuals <= allowed * TOLERANCE * found.values).all())
    assert found.values.tolist() == pytest.approx([10.0, 10 ** (1 - 3 / 59)], rel=TOLERANCE)
    assert operator.products >= 2
    assert found.start.shape[1] == 60


def test_power_iteration_gives_up(monkeypatch):
    monkeypatch.setattr(methods, "LIMIT", 3)
    operator = Counted(DenseOperator(torch.diag(torch.linspace(1, 0.9, 20))))
    METHODS["power"].find(operator, 2, None)
    assert operator.products == 6


def test_all_methods_follow_one_run():
    values, course = {}, record(RUN, "cpu")
    for name in METHODS:
        measurement, values[name] = measure(replace(TINY, method=name), course)
        assert measurement.measurements == 3
        assert measurement.residual <= TOLERANCE or not METHODS[name].bounded
        assert measurement.seconds > 0
        assert measurement.block_seconds > 0
    for name in METHODS:
        torch.testing.assert_close(values[name], values["eigsh-cold"], rtol=2 * TOLERANCE, atol=0)


def test_a_run_is_gradient_descent():
    course = record(RUN, "cpu")
    made = problem(RUN, "cpu")
    model, (inputs, targets) = made.model, made.train
    for step in range(RUN.steps + 1):
        flat = parameters_to_vector(model.parameters())
        if step % RUN.every == 0:
            torch.testing.assert_close(course[step // RUN.every], flat.detach())
        gradient = torch.autograd.grad(made.loss(model(inputs), targets), list(model.parameters()))
        vector_to_parameters(flat.detach() - RUN.eta * parameters_to_vector(gradient), model.parameters())


def test_a_missed_bound_is_wrong():
    good = Measurement("done", seconds=1.0, residual=TOLERANCE)
    assert not Entry(TINY, good, 0.0).wrong
    assert Entry(TINY, replace(good, residual=1.1 * TOLERANCE), 0.0).wrong
    assert Entry(TINY, replace(good, residual=float("nan")), 0.0).wrong
    assert Entry(replace(TINY, method="eigsh-cold"), good, 3 * TOLERANCE).wrong
    assert not Entry(replace(TINY, method="power"), replace(good, residual=1.0), None).wrong
    assert Entry(TINY, Measurement("failed", "RuntimeError: x"), None).wrong
    assert not Entry(TINY, Measurement("out of time", "x"), None).wrong


def test_command_writes_what_it_prints(tmp_path, capsys):
    output = tmp_path / "tracking.json"
    options = ["--samples", "30", "--width", "6", "--steps", "4", "--every", "2", "--repeats", "2", "--threads", "1"]
    assert main([*options, "--methods", "eigsh-warm", "--output", str(output)]) == 0
    entries = json.loads(output.read_text())["measurements"]
    assert [entry["request"]["method"] for entry in entries] == ["eigsh-warm"]
    assert all(entry["measurement"]["outcome"] == "done" for entry in entries)
    printed = capsys.readouterr().out
    assert "eigsh" in printed
    assert f"P = {64 * 6 + 6 + 42 + 70}" in printed


@pytest.mark.parametrize("options", [["--every", "0"], ["--steps", "-1"], ["--eta", "0"], ["--width", "0"], ["--runs"]])
def test_bad_options_are_usage_errors(options):
    assert main(options) == 2


def test_what_stopped_a_method_is_said():
    entries = [Entry(TINY, Measurement("out of time", "stopped after 1 s"), None)]
    assert "out of time" in report.notes(entries)[0]
    assert report.table(entries).row_count == 1


def test_absent_images_are_an_error_of_their_own(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("CURVLAB_DATA", str(tmp_path))
    monkeypatch.setattr("pooch.retrieve", lambda *_, **__: (_ for _ in ()).throw(OSError("no network")))
    assert main(["--runs", "readme"]) == 3
    assert "CURVLAB_DATA" in capsys.readouterr().err
