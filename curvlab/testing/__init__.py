"""Checks of what is added to curvlab, in the manner of scikit-learn's estimator checks: for ours and for yours.

    check_structure(MyStructure)                an approximation of the Fisher matrix
    check_layer(MyLayer(3, 4), inputs)          rows of a layer, with or without a rule of its own
    check_problem(my_function)                  a data set with a model
    check_analysis(ANALYSIS, "--widths", "8")   an analysis, run at a small size

Each raises `AssertionError` with what does not hold, and where, against dense float64 references by `torch.func`
(`curvlab.testing.oracle`). They need no pytest.
"""

from curvlab.testing.analyses import check_analysis
from curvlab.testing.layers import check_layer
from curvlab.testing.problems import check_problem
from curvlab.testing.structures import check_structure

__all__ = ["check_analysis", "check_layer", "check_problem", "check_structure"]
