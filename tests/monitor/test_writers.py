"""Measurements arrive where they are written to, and files survive an interruption."""

import sys
from types import SimpleNamespace

import pandas as pd
import pytest

from curvlab.monitor import CSV, LiveFigure, MLflow, TensorBoard, Trackio, WandB
from curvlab.monitor.writers import as_log

VALUES = {"edge/ratio": 0.5, "layers/a,b/dead": 0.1 + 0.2}


def test_csv_has_a_line_a_number_to_the_last_digit(tmp_path):
    path = tmp_path / "new" / "curves.csv"
    writer = CSV(path)
    writer(VALUES, 3)
    writer({"rank/effective": float("inf")}, 4)
    table = pd.read_csv(path)
    assert list(table["step"]) == [3, 3, 4]
    assert dict(zip(table["name"], table["value"], strict=True)) == VALUES | {"rank/effective": float("inf")}


@pytest.mark.parametrize("torn", ["", "7,edge/ra", "7"])
def test_csv_goes_on_after_an_interruption_in_the_middle_of_a_line(tmp_path, torn):
    path = tmp_path / "curves.csv"
    CSV(path)(VALUES, 3)
    with path.open("a") as file:
        file.write(torn)
    CSV(path)({"rank/effective": 2.0}, 8)
    table = pd.read_csv(path)
    assert list(table["step"]) == [3, 3, 8]
    assert path.read_text().count("step,name,value") == 1


def test_csv_begins_anew_where_even_the_header_is_torn(tmp_path):
    path = tmp_path / "curves.csv"
    path.write_text("step,na")
    CSV(path)(VALUES, 1)
    assert len(pd.read_csv(path)) == 2


def test_csv_does_not_add_to_another_file(tmp_path):
    path = tmp_path / "data.csv"
    path.write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="begins with another line"):
        CSV(path)
    assert path.read_text() == "a,b\n1,2\n"


def test_functions_of_values_or_of_values_and_step_are_writers():
    seen = []
    as_log(lambda values: seen.append(values))(VALUES, 3)
    as_log(lambda values, step: seen.append((values, step)))(VALUES, 4)
    as_log(lambda data, step=None, commit=True: seen.append((data, step)))(VALUES, 5)
    assert seen == [{**VALUES, "step": 3}, (VALUES, 4), (VALUES, 5)]


@pytest.mark.parametrize(
    ("writer", "reason"), [(3, "got a int"), (lambda: 0, "takes ()"), (lambda a, b, c: 0, "takes")]
)
def test_what_cannot_be_called_so_is_refused(writer, reason, unchecked_types):
    with pytest.raises(TypeError, match=reason):
        as_log(writer)


def test_runs_of_weights_and_biases_keep_their_own_count_of_steps():
    seen = []
    WandB(SimpleNamespace(log=seen.append))(VALUES, 3)
    assert seen == [{**VALUES, "monitor/step": 3}]


@pytest.mark.parametrize(
    ("make", "package"),
    [
        (lambda path: TensorBoard(path), "tensorboard"),
        (lambda path: MLflow(), "mlflow"),
        (lambda path: Trackio(), "trackio"),
    ],
)
def test_missing_packages_are_named_with_a_remedy(make, package, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ImportError, match=f"pip install {package}"):
        make(tmp_path)


@pytest.mark.filterwarnings("default")
def test_tensorboard_reads_what_was_written(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    writer = TensorBoard(tmp_path)
    writer(VALUES, 3)
    writer.writer.close()
    found = EventAccumulator(str(tmp_path)).Reload()
    (scalar,) = found.Scalars("edge/ratio")
    assert (scalar.step, scalar.value) == (3, 0.5)


@pytest.mark.filterwarnings("default")
def test_mlflow_reads_what_was_written(tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    mlflow.set_tracking_uri((tmp_path / "runs").as_uri())
    with mlflow.start_run() as run:
        MLflow()({"edge/ratio": 0.5}, 3)
        MLflow(run.info.run_id)({"edge/ratio": 0.25}, 4)
    history = mlflow.MlflowClient().get_metric_history(run.info.run_id, "edge/ratio")
    assert [(metric.step, metric.value) for metric in history] == [(3, 0.5), (4, 0.25)]


@pytest.mark.filterwarnings("default")
def test_runs_of_weights_and_biases_take_it_offline(tmp_path):
    wandb = pytest.importorskip("wandb")
    run = wandb.init(mode="offline", dir=str(tmp_path), project="test")
    WandB(run)(VALUES, 3)
    assert run.summary["edge/ratio"] == 0.5
    assert run.summary["monitor/step"] == 3
    run.finish()


@pytest.mark.filterwarnings("default")
def test_trackio_is_logged_to_by_step(monkeypatch):
    trackio = pytest.importorskip("trackio")
    seen = []
    monkeypatch.setattr(trackio, "log", lambda metrics, step=None: seen.append((metrics, step)))
    Trackio()(VALUES, 3)
    assert seen == [(VALUES, 3)]


def test_a_live_figure_outside_of_a_notebook_says_what_does_without_one(monkeypatch):
    monkeypatch.setitem(sys.modules, "IPython", None)
    with pytest.raises(RuntimeError, match=r"needs IPython.*monitor\.plot\(\)"):
        LiveFigure()
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: None, version_info=(9, 0)))
    monkeypatch.setitem(sys.modules, "IPython.display", SimpleNamespace(DisplayHandle=object, Image=object))
    with pytest.raises(RuntimeError, match="There is no notebook"):
        LiveFigure()


def test_a_live_figure_is_shown_once_and_then_brought_up_to_date(monkeypatch):
    shown = []

    class Handle:
        def display(self, image):
            shown.append(("display", image.data[:4]))

        def update(self, image):
            shown.append(("update", image.data[:4]))

    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=object, version_info=(9, 0)))
    display = SimpleNamespace(DisplayHandle=Handle, Image=lambda data: SimpleNamespace(data=data))
    monkeypatch.setitem(sys.modules, "IPython.display", display)
    import torch

    import curvlab

    model = torch.nn.Linear(2, 2)
    figure = LiveFigure(seconds=0.0)
    monitor = curvlab.monitor(model, torch.nn.MSELoss(), ["layers"], every=1, writers=figure)
    for _ in range(2):
        monitor.after_step(torch.ones(3, 2), torch.zeros(3, 2))
    assert shown == [("display", b"\x89PNG"), ("update", b"\x89PNG")]
    figure.seconds = 1e6
    monitor.after_step(torch.ones(3, 2), torch.zeros(3, 2))
    assert len(shown) == 2
