"""Analyses by name: curvlab's own, and those that installed packages add."""

from typing import Any

from curvlab.study.analysis import Analysis
from curvlab.tools.registry import Registry

ANALYSES: Registry[Analysis[Any]] = Registry(
    "analysis", "curvlab.analyses", form="an Analysis", fits=lambda thing: isinstance(thing, Analysis)
)
"""What `curvlab run` runs; a package adds to it by an entry point of the group ``curvlab.analyses``."""
