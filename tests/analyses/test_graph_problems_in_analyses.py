"""The analyses of images and tables on a graph: one cell of every experiment, and what does not exist on nodes."""

from collections.abc import Mapping
from importlib import import_module
from typing import Any

import pytest
import torch

from analyses.ntk_isotropy.config import Config as IsotropyConfig
from analyses.ntk_isotropy.setting import Setting
from analyses.specs import classifies_nodes, squared
from curvlab.problems import ProblemError, resolve
from curvlab.study import Cell
from curvlab.study.execution import Plan

KARATE = "karate-gcn"
OPTIONS: Mapping[str, dict[str, Any]] = {
    "ntk_isotropy": {"widths": (8, 16), "structures": ("full", "kfac")},
    "jacobian_rank": {"samples": 4, "widths": (8, 16), "activation": ("relu",), "structures": ("full", "kfac")},
    "block_structure": {"steps": 3, "structures": ("kfac",), "beside": (), "directions": 8, "permutations": 2, "classes": (2, 3)},
    "spectrum": {"width": 8, "structures": ("full", "kfac"), "top": 2, "probes": 2, "lanczos": 8},
    "edge_of_stability": {
        "steps": 20, "every": 5, "etas": (0.3,), "structures": ("kfac",), "preconditioners": ("full",),
    },
}  # fmt: skip


def plan_of(name: str) -> Plan[Any]:
    analysis = import_module(f"analyses.{name}").ANALYSIS
    return Plan.of(analysis, analysis.config(problem=KARATE, seeds=1, **OPTIONS[name]))


def cells_on_the_graph(plan: Plan[Any]) -> list[Cell]:
    """One cell of every experiment that runs on the graph itself, the smallest of its kind."""
    found: dict[tuple[object, ...], Cell] = {}
    for cell in plan.planned:
        if cell.coordinates.get("problem", KARATE) == KARATE:
            key = tuple(cell.coordinates.get(name) for name in ("experiment", "inputs", "labels", "mode"))
            if key not in found or int(cell.coordinates.get("width", 0)) < int(found[key].coordinates.get("width", 0)):
                found[key] = cell
    return list(found.values())


@pytest.mark.parametrize("name", OPTIONS)
def test_every_experiment_runs_on_nodes(name: str) -> None:
    plan = plan_of(name)
    assert len(plan.data) == 64
    observed = {cell: plan.task().observe(cell) for cell in cells_on_the_graph(plan)}
    assert any(observed.values())


def test_experiments_on_other_networks_are_left_out() -> None:
    assert "inputs" not in {cell["experiment"] for cell in cells_on_the_graph(plan_of("ntk_isotropy"))}
    cells = cells_on_the_graph(plan_of("jacobian_rank"))
    assert not {"networks", "structures"} & {cell["experiment"] for cell in cells}
    kinds = {cell.coordinates.get("inputs") for cell in cells}
    assert kinds & {"duplicated", "parallel", "near"} == {"duplicated"}


def test_kernels_of_a_graph_are_divided_by_its_nodes() -> None:
    """The nodes are one sample of the rows; Θ = J Jᵀ/N is that of the loss all the same."""
    cell = Cell({"experiment": "response", "width": 8, "depth": 2, "activation": "relu", "outputs": 0, "seed": 0})
    setting = Setting.of(cell, IsotropyConfig(problem=KARATE, widths=(8,)))
    assert isinstance(setting, Setting)
    model, x = setting.problem.model, setting.inputs
    J = torch.func.jacrev(lambda p: torch.func.functional_call(model, p, (x,)).T.flatten())(
        {name: value.detach() for name, value in model.named_parameters()}
    )
    dense = torch.cat([part.flatten(1) for part in J.values()], dim=1)
    torch.testing.assert_close(torch.as_tensor(setting.kernels.sum(0)), dense @ dense.T / len(x))
    torch.testing.assert_close(setting.rows.gram(), dense @ dense.T / len(x))


def test_graphs_are_known_by_name_and_squared_by_argument() -> None:
    assert classifies_nodes("cora-gcn")
    assert not classifies_nodes("digits")
    assert squared(KARATE) == {"loss": "half-squared"}
    assert squared("digits") == {}
    assert resolve(KARATE, **squared(KARATE)).train[1].shape == (4, 4)


def test_too_many_samples_are_an_error_of_usage() -> None:
    analysis = import_module("analyses.jacobian_rank").ANALYSIS
    with pytest.raises(ProblemError, match="karate has 4 training nodes in the split 'public'; 40 were asked for"):
        analysis.data_hash(analysis.config(problem=KARATE))
