"""The analysis as one object: its experiment and figure."""

from functools import partial

from analyses.monitor import panels
from analyses.monitor.config import Config
from analyses.monitor.experiment import RUNS, title
from curvlab.study import Analysis
from curvlab.study.panels import PanelGrid

_layout = partial(PanelGrid, "python -m analyses.monitor")

ANALYSIS: Analysis[Config] = Analysis(
    name="monitor",
    version=1,
    question="Does curvlab.monitor keep to its share of the time, and does it tell of instabilities before the loss does?",
    examples=(
        "--further karate-gcn fashion-lenet characters   # all four problems; the last two take minutes a run",
        "--problem my.module:problem --further   # a problem of one's own, by SGD from a learning rate of 0.02 on",
    ),
    cost="digits and karate, 12 seeds, a run of 8000 steps at a constant and one at a growing rate: about 2 minutes on 2 cores.",
    config=Config,
    experiments=(RUNS,),
    subject=lambda config: {name: title(name) for name in config.problems} | {"steps": config.steps},
    data_hash=lambda config: config.data_hash,
    figures={
        "monitor": _layout(
            [[panels.told, panels.ahead, panels.shares]], claims=("told-", "ahead-", "share-"), height=2.4, columns=4
        )
    },
    axes=("problem", "further"),
    memory_option="--problem",
)
