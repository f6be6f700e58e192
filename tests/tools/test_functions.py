"""Functions as data."""

import json

import numpy as np

from curvlab.tools.functions import described

LIMIT = 0.1


def above(limit):
    return lambda table: table[table > limit]


def helped(table):
    return helper(table)


def helper(table):
    return above(LIMIT)(table)


def other(table):
    return table


def test_functions_that_differ_in_a_value_or_in_a_function_that_they_call_are_told_apart(monkeypatch):
    assert described(above(1.0)) == described(above(1.0)) != described(above(2.0))
    assert described(above(1.0))["with"] == {"limit": 1.0}
    before = described(helped)
    monkeypatch.setitem(globals(), "LIMIT", 0.2)
    with_limit = described(helped)
    monkeypatch.setitem(globals(), "helper", other)
    assert len({json.dumps(one) for one in (before, with_limit, described(helped))}) == 3


def test_layout_comments_and_docstrings_of_a_function_do_not_matter(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    codes = {
        "plain": 'def f(table):\n    return table + "a"\n',
        "other_layout": 'def f(\n    table,\n):\n    """Document."""\n    # why\n    return table + \'a\'\n',
        "other_code": 'def f(table):\n    return table + "b"\n',
    }
    found = {}
    for name, code in codes.items():
        (tmp_path / f"{name}.py").write_text(code)
        found[name] = described(__import__(name).f)["code"]
    assert found["plain"] == found["other_layout"] != found["other_code"]


def test_things_of_all_sorts_are_described_without_addresses():
    def recursive(depth):
        return recursive(depth - 1) if depth else LIMIT

    things = [
        recursive,
        np.log,
        np.arange(3),
        float("nan"),
        {1: {"b", "a"}},
        above,
        described,
        eval("lambda x: x"),
        open,
    ]
    text = json.dumps(described(things))
    assert "0x" not in text
    assert '"NaN"' in text or '"nan"' in text
    assert described([1, (2.5, None)]) == [1, [2.5, None]]
