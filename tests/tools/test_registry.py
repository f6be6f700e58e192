"""Things by name, from a plain call and from the entry points of installed packages."""

import sys
from inspect import isfunction

import pytest

from curvlab.tools.errors import CommandError
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


@pytest.fixture
def module(tmp_path, monkeypatch):
    """A folder in which one stands, with a module in it."""
    (tmp_path / "standing_here.py").write_text("def thing(): pass\nclass Thing: pass\nnumber = 3\n")
    (tmp_path / "needy.py").write_text("import a_module_that_is_not_there\n")
    (tmp_path / "unfinished.py").write_text("width = depth\n")
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.chdir(tmp_path)
    yield Registry("thing", "curvlab.things", form="a function", fits=isfunction)
    for name in ("standing_here", "needy", "unfinished"):
        sys.modules.pop(name, None)


def test_a_module_of_this_folder_adds_what_is_asked_for_by_its_name(module):
    thing = module["standing_here:thing"]
    assert thing is sys.modules["standing_here"].thing
    assert "standing_here:thing" in module
    assert "standing_here:number" not in module
    assert list(module) == [], "it is not among those that are listed"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "standing_here:thin",
            r"Thing 'standing_here:thin': Unknown function of standing_here 'thin'. Did you mean 'thing'?",
        ),
        ("standing_here:number", "number is int, not a function"),
        ("standing_here:Thing", "Thing is the class Thing, not a function"),
        (
            "standing_her:thing",
            "importing 'standing_her' failed .*Did you mean 'standing_here'.* looked for in .*PYTHONPATH",
        ),
        ("needy:thing", "importing 'needy' failed .*a_module_that_is_not_there.*[.]$"),
        ("unfinished:thing", "importing 'unfinished' raised NameError: name 'depth' is not defined"),
        (":thing", "importing '' raised ValueError"),
        ("__main__:thing", "Unknown function of __main__ 'thing'.* __main__ is what was started"),
    ],
)
def test_what_a_module_does_not_have_is_explained(module, name, message):
    with pytest.raises(CommandError, match=message):
        module[name]
    assert name not in module
