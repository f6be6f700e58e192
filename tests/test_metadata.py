"""The version stands in one place, and what repeats it agrees."""

import re
from importlib.metadata import version
from pathlib import Path

import curvlab

ROOT = Path(__file__).parents[1]


def test_the_installed_package_has_the_version_of_the_code():
    assert curvlab.__version__ == version("curvlab")


def test_the_citation_names_the_version():
    cited = re.search(r"^version: (.+)$", (ROOT / "CITATION.cff").read_text(), flags=re.MULTILINE)
    assert cited
    assert cited[1] == curvlab.__version__
