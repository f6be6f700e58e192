"""Models under `fully_shard`, every process with its share of each batch, against one process with all of it."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from natural_gradients import OF_LAYERS
from sharded_training import go_on, ignoring, one_layer, save_half, train
from torchrun import run

from curvlab.testing.oracle import assert_close

# Checkpoints are written and read without processes here.
pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

SCRIPT = Path(__file__).parent / "sharded_training.py"
FEW = ["kfac", "ekfac", "diagonal", "component-wise"]


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("sharded") / "found"


@pytest.fixture(scope="module")
def trained(file: Path) -> list[dict[str, Any]]:
    return trained_by(2, file, FEW)


def trained_by(processes: int, file: Path, names: Iterable[str]) -> list[dict[str, Any]]:
    for name in names:
        save_half(name, f"{file}.{name}.one")
    return run(SCRIPT, processes, file, *names)


@pytest.mark.parametrize("name", FEW)
def test_sharded_training_ends_where_one_process_does(name: str, trained: list[dict[str, Any]]) -> None:
    alone = train(name)
    for of_process in trained:
        assert_close(of_process[name]["parameters"], alone["parameters"], 1e-9)


@pytest.mark.parametrize("name", FEW)
def test_processes_hold_a_part_of_the_state_each(name: str, trained: list[dict[str, Any]]) -> None:
    held = [of_process[name]["held"] for of_process in trained]
    alone = train(name)["held"]
    assert sum(held) == alone
    assert max(held) < 0.75 * alone


@pytest.mark.parametrize("name", FEW)
def test_a_checkpoint_of_one_process_goes_on_in_several(name: str, trained: list[dict[str, Any]]) -> None:
    for of_process in trained:
        assert_close(of_process["gone on"][name], train(name)["parameters"], 1e-9)


@pytest.mark.usefixtures("trained")
@pytest.mark.parametrize("name", FEW)
def test_a_checkpoint_of_several_processes_goes_on_in_one(name: str, file: Path) -> None:
    assert_close(go_on(name, f"{file}.{name}.several"), train(name)["parameters"], 1e-9)


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("name", ["kfac", "diagonal", "ekfac"])
def test_a_process_without_targets_takes_part(name: str, whole: bool, trained: list[dict[str, Any]]) -> None:
    for of_process in trained:
        assert_close(of_process["ignoring"][name, whole], ignoring(name), 1e-9)


@pytest.mark.parametrize(
    ("case", "said"),
    [
        ("full", "full structure spans several layers"),
        ("bare parameter", "scale have no factored rows"),
        ("quadratic", "quadratic model"),
        ("partly", "1.weight is whole in every process"),
        ("another axis", "no tensor parallelism"),
        ("late", "fully_shard was applied"),
        ("rebind", "make a new Preconditioner"),
    ],
)
def test_what_cannot_be_sharded_is_refused_by_name(case: str, said: str, trained: list[dict[str, Any]]) -> None:
    for of_process in trained:
        assert said in of_process["refused"][case]


def test_the_graph_of_a_sharded_model_tells_that_samples_stay_apart(trained: list[dict[str, Any]]) -> None:
    assert not any(of_process[name]["checked"] for of_process in trained for name in FEW)


def test_a_process_without_layers_takes_part(trained: list[dict[str, Any]]) -> None:
    for of_process in trained:
        assert_close(of_process["one layer"], one_layer(), 1e-9)


@pytest.mark.study
@pytest.mark.parametrize("processes", [1, 2, 3])
def test_every_structure_of_single_layers_can_be_sharded(processes: int, tmp_path: Path) -> None:
    for of_process in trained_by(processes, tmp_path / "found", OF_LAYERS):
        for name in OF_LAYERS:
            assert_close(of_process[name]["parameters"], train(name)["parameters"], 1e-9)
            assert_close(of_process["gone on"][name], train(name)["parameters"], 1e-9)


@pytest.mark.study
def test_a_checkpoint_of_three_processes_goes_on_in_two(tmp_path: Path) -> None:
    trained_by(3, tmp_path / "found", FEW)
    for name in FEW:
        (tmp_path / f"found.{name}.several").rename(tmp_path / f"again.{name}.one")
    for of_process in run(SCRIPT, 2, tmp_path / "again", *FEW):
        for name in FEW:
            assert_close(of_process["gone on"][name], train(name)["parameters"], 1e-9)
