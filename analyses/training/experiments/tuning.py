"""Every configuration of every method, from the tuning seed: the table from which the judged configurations come."""

from analyses.training.config import Config
from analyses.training.entrants import TUNING, TUNING_SEED, entrants, final_loss, run, seconds, steps_to
from analyses.training.methods import METHODS, described
from curvlab.study import Cell, Context, Experiment, Observations, Point


def _points(config: Config) -> list[Point]:
    indices = range(config.configurations)
    return [
        {"method": method.name, "configuration": index, "seed": TUNING_SEED}
        for method in entrants(config)
        for index in indices
    ]


def _measure(cell: Cell, context: Context[Config]) -> Observations:
    method, index = METHODS[str(cell["method"])], int(cell["configuration"])
    trace = run(method, index, int(cell["seed"]), context)
    return [
        {**steps_to("loss", trace, context.config.race, "tuning_steps"), "point": described(method.points[index])},
        final_loss(trace, "tuning_loss"),
    ]


TUNE: Experiment[Config] = Experiment(name=TUNING, cells=_points, measure=_measure, seconds=seconds, memory=8e8)
