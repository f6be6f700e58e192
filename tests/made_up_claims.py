"""Claims about quantities of known values, and measurements of these."""

from dataclasses import replace

import numpy as np
import pandas as pd

from curvlab.study import Claim, judge, undecided


def claim(rule, name="q0", **fields):
    """A claim about the quantity ``name``."""
    defaults = {"id": name, "statement": "s", "source": "s", "measured": "m", "group": "paper"}
    return Claim(rule=replace(rule, quantities=name), **(defaults | {"expected": undecided("r")} | fields))


def measured(*values):
    """Long-form measurements; ``values[k]`` are those of the quantity ``q<k>``, one per seed."""
    return pd.DataFrame(
        {
            "quantity": np.repeat([f"q{k}" for k in range(len(values))], [len(v) for v in values]),
            "seed": np.concatenate([np.arange(len(v)) for v in values]),
            "value": np.concatenate(values).astype(float),
        }
    )


def one(rule, values, **fields):
    """The verdict on a single claim."""
    [verdict] = judge([claim(rule, **fields)], measured(np.asarray(values)))
    return verdict
