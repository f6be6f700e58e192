"""The training loop: what it keeps, where a run ends, and that an interrupted one goes on as if nothing had happened."""

import logging

import numpy as np
import pytest
import torch

from curvlab.study import Diverged, Trace, follow, loop
from curvlab.study.loop import Process


class Halving:
    """θ ← θ/2 + noise: the state is the position and the generator of the noise."""

    def __init__(self, seed=0):
        self.position = torch.tensor([8.0, -3.0], dtype=torch.float64)
        self.generator = torch.Generator().manual_seed(seed)
        self.looked = []

    def look(self, step):
        self.looked.append(step)
        return {"position": self.position.tolist(), "norm": float(self.position.norm())}

    def step(self, step):
        noise = torch.randn(2, generator=self.generator, dtype=torch.float64)
        self.position = self.position / 2 + noise
        return {"noise": noise.tolist()} if step % 2 else None

    def state_dict(self):
        return {"position": self.position, "generator": self.generator.get_state()}

    def load_state_dict(self, state):
        if state["position"].shape != (2,):
            raise ValueError("the position is a point of the plane")
        self.position = state["position"]
        self.generator.set_state(state["generator"])


class Interrupted(Halving):
    """It is stopped from outside at a step."""

    def __init__(self, at):
        super().__init__()
        self.at = at

    def look(self, step):
        if step == self.at:
            raise KeyboardInterrupt
        return super().look(step)


@pytest.fixture(autouse=True)
def always(monkeypatch):
    """Save before every step."""
    monkeypatch.setattr(loop, "SAVED", -1.0)


def leave_checkpoint(path, at=3):
    with pytest.raises(KeyboardInterrupt):
        follow(Interrupted(at), 6, checkpoint=path)
    return torch.load(path, weights_only=True)


def test_a_process_is_one_by_its_verbs():
    assert isinstance(Halving(), Process)


def test_what_is_seen_before_each_step_and_after_the_last_is_kept_in_order():
    process = Halving()
    trace = follow(process, 4)
    assert [seen["step"] for seen in trace.seen] == process.looked == [0, 1, 2, 3, 4]
    assert trace.series("norm")[0] == pytest.approx(73**0.5)
    assert trace.series("position").shape == (5, 2)
    assert trace.series("position")[-1].tolist() == process.position.tolist()
    assert (trace.diverged, trace.status) == (None, "ok")


def test_what_a_step_adds_belongs_to_what_was_seen_before_it():
    trace = follow(Halving(), 4)
    assert [seen["step"] for seen in trace.seen if "noise" in seen] == [1, 3]
    positions, noise = trace.series("position"), trace.series("noise")
    assert np.allclose(positions[[2, 4]], positions[[1, 3]] / 2 + noise)


def test_what_a_step_adds_where_nothing_was_seen_before_it_stands_alone():
    class Rarely(Halving):
        def look(self, step):
            return super().look(step) if step == 2 else None

    trace = follow(Rarely(), 4)
    assert [sorted(seen) for seen in trace.seen] == [["noise", "step"], ["norm", "position", "step"], ["noise", "step"]]
    assert [seen["step"] for seen in trace.seen] == [1, 2, 3]


def test_nothing_seen_is_nothing_kept():
    class Silent(Halving):
        def look(self, step):
            return super().look(step) if step == 2 else None

        def step(self, step):
            super().step(step)

    assert [seen["step"] for seen in follow(Silent(), 4).seen] == [2]


def test_no_steps_are_one_look():
    assert [seen["step"] for seen in follow(Halving(), 0).seen] == [0]


def test_a_run_ends_before_the_step_where_the_condition_holds():
    process = Halving()
    trace = follow(process, 50, until=lambda seen: seen["norm"] < 3)
    norms = trace.series("norm")
    assert norms[-1] < 3 <= norms[:-1].min()
    assert float(process.position.norm()) == norms[-1]
    assert trace.diverged is None


@pytest.mark.parametrize("kept", [None, {"norm": float("inf")}])
def test_divergence_that_is_seen_ends_the_run_and_keeps_the_rest(kept, tmp_path):
    class Diverging(Halving):
        def look(self, step):
            if step == 3:
                raise Diverged(kept)
            return super().look(step)

    trace = follow(Diverging(), 6, checkpoint=tmp_path / "run.pt")
    assert (trace.diverged, trace.status) == (3, "diverged at step 3")
    assert [seen["step"] for seen in trace.seen] == [0, 1, 2] + [3] * (kept is not None)
    assert kept is None or trace.seen[-1] == {"step": 3, **kept}
    assert not list(tmp_path.iterdir())


def test_a_step_that_cannot_be_taken_counts():
    class Diverging(Halving):
        def step(self, step):
            if step == 2:
                raise Diverged
            return super().step(step)

    trace = follow(Diverging(), 6)
    assert (trace.diverged, [seen["step"] for seen in trace.seen]) == (3, [0, 1, 2])


@pytest.mark.parametrize("at", [1, 3, 6])
def test_an_interrupted_run_goes_on_exactly(at, tmp_path):
    whole, process, path = Halving(), Halving(seed=1), tmp_path / "folder" / "run.pt"
    expected = follow(whole, 6)
    leave_checkpoint(path, at)
    assert follow(process, 6, checkpoint=path) == expected
    assert process.looked == list(range(at, 7)), "the rehearsal is another's"
    assert torch.equal(process.position, whole.position)
    assert not path.exists()


def test_a_short_run_leaves_no_checkpoint(tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "SAVED", 1e9)
    with pytest.raises(KeyboardInterrupt):
        follow(Interrupted(3), 6, checkpoint=tmp_path / "run.pt")
    assert not list(tmp_path.iterdir())


def crafted(state, damage):
    return {
        "no state": [1, 2],
        "another process": {**state, "process": {**state["process"], "position": torch.ones(3)}},
        "a step of the past": {**state, "step": 1},
        "no series": {name: entry for name, entry in state.items() if name != "seen"},
    }[damage]


@pytest.mark.parametrize("damage", ["truncated", "no state", "another process", "a step of the past", "no series"])
def test_a_damaged_checkpoint_is_set_aside_and_the_run_computed_again(damage, tmp_path, caplog):
    path, process = tmp_path / "run.pt", Halving()
    state = leave_checkpoint(path)
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:-200])
    else:
        torch.save(crafted(state, damage), path)
    with caplog.at_level(logging.WARNING):
        assert follow(process, 6, checkpoint=path) == follow(Halving(), 6)
    assert process.looked[0] == 0
    assert [file.name for file in tmp_path.iterdir()] == ["run.pt.damaged"]
    assert "cannot be taken up" in caplog.text


def test_a_checkpoint_that_cannot_be_gone_on_from_leaves_the_run_untouched(tmp_path):
    """What the rehearsal finds out only by stepping."""

    class Fragile(Halving):
        def step(self, step):
            if abs(float(self.position[0])) > 1e6:
                raise FloatingPointError("overflow")
            return super().step(step)

    path = tmp_path / "run.pt"
    state = leave_checkpoint(path)
    state["process"]["position"] = torch.full((2,), 1e9)
    torch.save(state, path)
    assert follow(Fragile(), 6, checkpoint=path) == follow(Halving(), 6)
    assert path.with_name("run.pt.damaged").exists()


def test_a_trace_without_observations_has_empty_series():
    assert Trace().series("loss").shape == (0,)
