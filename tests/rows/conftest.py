"""Libraries of models, which are imported once."""

import sys
import warnings
from typing import Any

import pytest


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
