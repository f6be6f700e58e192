"""The dummy on problems whose names say how much they add to its numbers, such as ``plus-1.5``."""

import dataclasses

from dummy_analysis import Options, changed, measure

from curvlab.study import Cell, Context


def shifted(cell: Cell, context: Context[Options]) -> list[dict[str, object]]:
    shift = float(context.config.problem.partition("-")[2] or 0)
    alpha, *others = measure(cell, context)
    return [alpha | {"value": alpha["value"] + shift}, *others]


TRAVELLING = dataclasses.replace(changed(measure=shifted), name="travelling", examples=())
SEVERAL = ("plus-0", "plus-0.1", "plus-0.3", "plus-0.2", "plus--2")
