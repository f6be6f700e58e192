"""The plan keeps measurements within the budget, by a clock that is made up."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from curvlab.monitor.planner import MARGIN, PASSING, WARM_UP, Budget, Every

STEP = 1.0


def run(plan, steps, costs, step=STEP):
    """Train with steps of a length, measure what is due at given costs; returns the steps of each measurement."""
    seen = {name: [] for name in costs}
    for t in range(steps):
        plan.earn(step)
        for name, cost in costs.items():
            if plan.due(name):
                seen[name].append(t)
                plan.spend(cost(len(seen[name])) if callable(cost) else cost, name)
    return seen


@given(
    share=st.floats(0.005, 0.5),
    costs=st.lists(st.floats(0.01, 30.0), min_size=1, max_size=4),
    weights=st.lists(st.floats(0.1, 10.0), min_size=4, max_size=4),
)
def test_quantities_that_cost_what_they_state_never_exceed_the_budget(share, costs, weights):
    names = [f"q{i}" for i in range(len(costs))]
    plan = Budget(share, dict(zip(names, weights, strict=False)), dict(zip(names, costs, strict=True)))
    for _ in range(WARM_UP):
        plan.earn(STEP)
    for _ in range(300):
        run(plan, 1, dict(zip(names, costs, strict=True)))
        assert plan.spent <= share * plan.trained * (1 + 1e-12)


def test_budget_is_used_up_and_shared_by_weight():
    plan = Budget(0.1, {"heavy": 3.0, "light": 1.0}, {"heavy": 2.0, "light": 1.0})
    seen = run(plan, 4000, {"heavy": 2.0, "light": 1.0})
    assert plan.spent == pytest.approx(0.1 * plan.trained, rel=0.03)
    assert len(seen["heavy"]) * 2.0 == pytest.approx(3 * len(seen["light"]), rel=0.03)


def test_first_measurement_waits_until_the_passes_that_it_states_fit():
    seen = run(Budget(0.02, {"q": 1.0}, {"q": 10.0}), 2000, {"q": 1.0})["q"]
    assert seen[0] == WARM_UP + MARGIN * 500 - 1  # 10 steps are 2 % of 500
    assert seen[1] == seen[0] + 1  # it took 1, the credit covers more


def test_what_a_first_measurement_overdraws_is_paid_back_by_all():
    plan = Budget(0.02, {"a": 1.0, "b": 1.0}, {"a": 1.0, "b": 1.0})
    seen = run(plan, 6000, {"a": lambda n: 50.0 if n == 1 else 1.0, "b": 1.0})
    assert seen["a"][0] == WARM_UP + MARGIN * 100 - 1
    # 0.02 t ≥ 50 + 1.5 before anything runs again
    assert min(seen["a"][1], *(t for t in seen["b"] if t > seen["a"][0])) >= 2574
    assert plan.spent <= 0.02 * plan.trained


def test_cost_is_the_larger_of_the_last_two_and_the_first_foretells_nothing():
    plan = Budget(0.5, {"q": 1.0}, {"q": 1.0})
    for _ in range(WARM_UP):
        plan.earn(1.0)
    spent = 0.0
    for seconds, expected in ((4.0, 1.0), (2.0, 2.0), (5.0, 5.0), (1.0, 5.0), (1.0, 1.0)):
        spent += seconds
        due_at = 2 * (spent + MARGIN * expected)
        before = plan.trained
        plan.spend(seconds, "q")
        while not plan.due("q"):
            plan.earn(1.0)
        assert plan.trained == max(-(-due_at // 1), before)


def test_warm_up_and_pauses_earn_no_time_to_measure():
    plan = Budget(0.1, {"q": 1.0}, {"q": 1.0})
    plan.earn(1000.0)
    plan.earn(1000.0)
    assert plan.trained == 0
    for _ in range(5):
        plan.earn(1.0)
    plan.earn(1.9)
    assert plan.trained == 6.9
    plan.earn(3600.0)
    assert plan.trained == pytest.approx(6.9 + 2 * 6.9 / 6)


def test_planning_itself_is_on_the_budget():
    plan = Budget(0.1, {"q": 1.0}, {"q": 1.0})
    for _ in range(100):
        plan.earn(1.0)
        plan.spend(0.2)
    assert not plan.due("q")


def test_nothing_is_asked_before_anything_may_be_due():
    plan = Budget(0.02, {"q": 1.0}, {"q": 10.0})
    for _ in range(WARM_UP + 1):
        plan.earn(1.0)
    assert plan.due()  # unknown yet
    assert not plan.due("q")
    plan.rest()
    asked = 0
    while not plan.due():
        plan.earn(1.0)
        asked += 1
    assert plan.due("q")
    assert asked == MARGIN * 500 - 1


def test_a_first_measurement_comes_earlier_where_steps_get_faster():
    plan = Budget(0.1, {"q": 1.0}, {"q": 10.0})
    for _ in range(WARM_UP):
        plan.earn(1.0)
    plan.earn(100.0)
    steps = 0
    while not plan.due("q"):
        unseen = plan.rest()
        plan.earn(1.0 * (unseen + 1), unseen + 1)
        steps += unseen + 1
    assert steps < 300  # while the first step alone would ask for 1500 s


def test_dropped_quantities_leave_their_part_to_the_others():
    plan = Budget(0.1, {"a": 9.0, "b": 1.0}, {"a": 1.0, "b": 1.0})
    for _ in range(WARM_UP + 15):
        plan.earn(1.0)
    assert not plan.due("b")
    plan.drop("a")
    assert plan.due("b")
    with pytest.raises(ValueError, match="Unknown quantity 'a'"):
        plan.due("a")


def test_every_measures_after_so_many_steps_and_says_so_one_step_ahead():
    plan = Every(3)
    due = []
    for t in range(1, 8):
        ahead = plan.due("q", ahead=1)
        plan.earn(1.0)
        assert plan.due("q") == ahead == plan.due()
        due += [t] if ahead else []
    assert due == [3, 6]


@pytest.mark.parametrize("share", [0.0, -1.0, 1.5, float("nan")])
def test_budgets_out_of_range_are_refused(share):
    with pytest.raises(ValueError, match="share of the training time"):
        Budget(share, {"q": 1.0}, {"q": 1.0})


def test_weights_and_intervals_out_of_range_are_refused():
    with pytest.raises(ValueError, match="weight of the quantity 'q'"):
        Budget(0.1, {"q": 0.0}, {"q": 1.0})
    with pytest.raises(ValueError, match="whole number of steps"):
        Every(0)


def test_steps_that_pass_unseen_end_before_anything_is_due():
    plan = Budget(0.02, {"q": 1.0}, {"q": 10.0})
    for _ in range(WARM_UP + 1):
        assert plan.rest() == 0
        plan.earn(1.0)
    assert not plan.due("q")
    looks = 0
    while not plan.due("q"):
        unseen = plan.rest()
        plan.earn(1.0 * (unseen + 1), unseen + 1)
        looks += 1
    assert plan.trained == pytest.approx(MARGIN * 500.0, abs=1.0)
    assert looks < 20


def test_looks_at_fast_steps_leave_the_budget_to_measurements():
    """A look costs the budget of two steps and a half: looks at every step would always put off what is nearly due."""
    step, look = 4e-4, 2e-5
    plan = Budget(0.02, {"q": 1.0}, {"q": 10.0})
    taken = looks = measured = 0
    while taken < 20000:
        unseen = plan.rest()
        plan.earn(step * (unseen + 1), unseen + 1)
        taken += unseen + 1
        if plan.due() and plan.due("q"):
            plan.spend(10 * step, "q")
            measured += 1
        plan.spend(look)
        looks += 1
    assert measured * 10 * step > 0.75 * 0.02 * taken * step
    assert looks * look < 0.2 * 0.02 * taken * step
    assert plan.spent <= 0.02 * plan.trained


def test_steps_that_pass_without_a_look_are_on_the_budget():
    plan = Budget(0.02, {"q": 1.0}, {"q": 1e9})
    for _ in range(WARM_UP + 1):
        plan.earn(1e-3)
    plan.earn(0.1, 100)
    assert plan.spent == pytest.approx(99 * PASSING)
