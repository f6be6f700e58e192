"""Does `curvlab.monitor` keep to its share of the time, and does it tell of instabilities before the loss shows them?

Modules: `config` (options), `courses` (training with a monitor), `experiment` (what is measured and claimed), `panels`.
"""

from analyses.monitor.analysis import ANALYSIS

__all__ = ["ANALYSIS"]
