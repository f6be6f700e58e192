"""Version control, memory and the words for them."""

import subprocess

import pytest

from curvlab.study import UsageError
from curvlab.study.environment import available_memory, check_device, environment, git_state
from curvlab.study.units import duration, number, size


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


def test_available_memory_is_between_a_megabyte_and_what_is_built_in(tmp_path):
    assert 2**20 < available_memory("cpu") <= environment(tmp_path, "cpu")["hardware"]["memory_bytes"]


def test_a_device_that_does_not_exist():
    check_device("cpu")
    with pytest.raises(UsageError, match="--device abacus cannot be used here"):
        check_device("abacus")


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.04, "0.0 s"),
        (9.94, "9.9 s"),
        (59.4, "59 s"),
        (125, "2 min 05 s"),
        (3599.9, "1 h 00 min"),
        (12000, "3 h 20 min"),
    ],
)
def test_duration(seconds, text):
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("amount", "text"),
    [(3, "3 B"), (1536, "1.5 KiB"), (3 * 2**20, "3.0 MiB"), (2**50, "1024.0 TiB")],
)
def test_size(amount, text):
    assert size(amount) == text


def test_number():
    assert number(float("nan")) == "–"
    assert number(0.123456) == "0.1235"
