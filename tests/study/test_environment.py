"""What a run ran on."""

import subprocess

import pytest

from curvlab.study import UsageError
from curvlab.study.environment import check_device, environment, git_state


def test_git_state_follows_the_repository(tmp_path):
    def git(*arguments):
        identity = ["-c", "user.name=t", "-c", "user.email=t@t"]
        subprocess.run(["git", "-C", str(tmp_path), *identity, *arguments], check=True, capture_output=True)

    source = tmp_path / "code.py"
    source.write_text("1")
    assert git_state(source) == {"commit": None, "dirty": None}
    git("init")
    assert git_state(source) == {"commit": None, "dirty": None}, "not tracked"
    git("add", "code.py")
    git("commit", "-m", "m")
    clean = git_state(source)
    assert len(clean["commit"]) == 40
    assert clean["dirty"] is False
    source.write_text("2")
    assert git_state(source) == {"commit": clean["commit"], "dirty": True}


def test_environment_names_versions_and_hardware(tmp_path):
    facts = environment(tmp_path / "code.py", "cpu")
    assert facts["packages"]["torch"]
    assert facts["hardware"]["device"] == "cpu"
    assert facts["hardware"]["cores"] >= 1
    assert facts["threads"]["torch"] >= 1


def test_a_device_that_does_not_exist():
    check_device("cpu")
    with pytest.raises(UsageError, match="--device abacus cannot be used here"):
        check_device("abacus")
