"""Things by name, from a plain call and from the entry points of installed packages."""

import sys

import pytest

from curvlab.tools.registry import BrokenPlugin, Registry, UnknownName


@pytest.fixture
def things(tmp_path, monkeypatch):
    """A registry with one thing of ours and an installed package that adds two, one of which cannot be loaded."""
    (tmp_path / "foreign.py").write_text("THING = 'theirs'\n")
    info = tmp_path / "foreign-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: foreign\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[curvlab.things]\ntheirs = foreign:THING\nbroken = foreign:NOTHING\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    yield Registry("thing", "curvlab.things")
    sys.modules.pop("foreign", None)


def test_ours_come_first_and_theirs_are_loaded_when_asked_for(things):
    assert things.register("ours", "ours") == "ours"
    assert list(things) == ["ours", "broken", "theirs"]
    assert ("theirs" in things, "nobody" in things, len(things)) == (True, False, 3)
    assert "foreign" not in sys.modules
    assert things["theirs"] == "theirs"


def test_an_entry_point_that_fails_is_named_with_its_package(things):
    with pytest.raises(
        BrokenPlugin, match=r"the thing 'broken' of the package foreign .foreign:NOTHING. cannot be load"
    ):
        things["broken"]


def test_an_unknown_name_suggests_the_nearest(things):
    things.register("kfac", 1)
    with pytest.raises(UnknownName, match=r"Unknown thing 'kfacc'. Did you mean 'kfac'?"):
        things["kfacc"]
    assert things.get("kfacc") is None


def test_a_class_that_is_defined_again_replaces_itself(things):
    def define():
        class Thing:
            pass

        return things.register("mine", Thing)

    first, second = define(), define()
    assert first is not second
    assert things["mine"] is second
    things.unregister("mine")
    assert "mine" not in things


def test_a_name_has_one_thing(things):
    things.register("ours", "ours")
    things.register("ours", "ours")
    with pytest.raises(ValueError, match="there is another thing called 'ours'"):
        things.register("ours", "others")
