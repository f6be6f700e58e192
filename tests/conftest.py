"""What holds for every test: types are checked, one thread a process, and no test fails because the machine is slow."""

import errno
import os
import sys
import warnings
from collections.abc import Iterator
from typing import Any

import jaxtyping
import pytest
import torch
import type_checks
from hypothesis import HealthCheck, settings

type_checks.install("curvlab")

# As many processes as cores run the tests; more threads would wait for each other. The variable is for started processes.
os.environ["OMP_NUM_THREADS"] = "1"
torch.set_num_threads(1)

settings.register_profile("curvlab", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("curvlab")


@pytest.fixture
def unchecked_types() -> Iterator[None]:
    """Switch off the type checks of the test run, which come before curvlab's own."""
    before = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", before)


class FullDisk:
    """Lets a number of atomic writes pass and fails every one after that, as a full disk does."""

    def __init__(self, monkeypatch):
        self._left = None
        self._replace = os.replace
        monkeypatch.setattr(os, "replace", self._try)

    def after(self, writes, name=""):
        """Be full after ``writes`` more writes of files with ``name`` in their path."""
        self._left, self._name = writes, name

    def freed(self):
        """Have space again."""
        self._left = None

    def _try(self, source, target):
        if self._left is not None and self._name in str(target):
            if self._left == 0:
                raise OSError(errno.ENOSPC, "No space left on device")
            self._left -= 1
        self._replace(source, target)


@pytest.fixture
def full_disk(monkeypatch):
    return FullDisk(monkeypatch)


@pytest.fixture(scope="session")
def transformers() -> Any:
    """Import the library without torchvision, which does not import beside every build of torch."""
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        patch.setitem(sys.modules, "torchvision", None)
        found = pytest.importorskip("transformers", reason="transformers is not installed")
        # Another library may have asked before.
        found.utils.is_torchvision_available.cache_clear()
        assert found.GPT2LMHeadModel
        assert found.ViTForImageClassification
    return found
