"""Every configuration of the methods that have several, from streams that no judged run has.

It is the table from which the judged ones come.
"""

from analyses.training.config import Config
from analyses.training.entrants import TUNING, VARIES, entrants, final_loss, run, seconds, steps_to
from analyses.training.methods import METHODS, described
from curvlab.study import Cell, Context, Experiment, Observations, Point, stream


def _points(config: Config) -> list[Point]:
    return [
        {"method": method.name, "configuration": index, "seed": start}
        for method in entrants(config)
        if method.tuned
        for index in range(config.configurations)
        for start in range(config.starts)
    ]


def _measure(cell: Cell, context: Context[Config]) -> Observations:
    method, index = METHODS[str(cell["method"])], int(cell["configuration"])
    trace = run(method, index, stream(int(cell["seed"]), "tuning"), context)
    return [
        {**steps_to("loss", trace, context.config.race, "tuning_steps"), "point": described(method.points[index])},
        final_loss(trace, "tuning_loss"),
    ]


TUNE: Experiment[Config] = Experiment(
    name=TUNING, cells=_points, measure=_measure, varies=VARIES, seconds=seconds, memory=8e8
)
