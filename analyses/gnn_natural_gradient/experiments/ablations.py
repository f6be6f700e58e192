"""What width, aggregated inputs and labels of the curvature add, one at a time, with published hyper-parameters."""

from dataclasses import replace

from analyses.gnn_natural_gradient.arms import Arm, experiment_of
from analyses.gnn_natural_gradient.comparisons import gain
from analyses.gnn_natural_gradient.config import Config
from analyses.gnn_natural_gradient.experiments.accuracy import name_of
from analyses.gnn_natural_gradient.recipe import ADAM
from curvlab.study import Claim, Experiment, undecided

WIDE = 64


def arms(_: Config) -> list[Arm]:
    """Return the arms, each of which differs in one thing from the published recipe of Adam or Adam with K-FAC."""
    return [
        Arm("adam wide", replace(ADAM, kfac=False, width=WIDE), {"change": "width, Adam"}),
        Arm("adam-kfac wide", replace(ADAM, width=WIDE), {"change": "width, K-FAC"}),
        Arm("not aggregated", replace(ADAM, aggregated=False), {"change": "aggregation"}),
        Arm("drawn labels", replace(ADAM, kind="mc"), {"change": "labels"}),
    ]


def _claims(config: Config) -> list[Claim]:
    kfac, adam = (name_of(method, "published") for method in ("adam-kfac", "adam"))
    claimed = (
        ("width-adam", "adam wide", adam, f"{WIDE} hidden units instead of 16 raise the test accuracy of Adam.",
         "The best published accuracy has 64 units."),
        ("width-kfac", "adam-kfac wide", kfac, f"{WIDE} hidden units instead of 16 raise the test accuracy of Adam with K-FAC.",
         "The best published accuracy has 64 units."),
        ("width-preconditioning", "adam-kfac wide", "adam wide", f"At {WIDE} hidden units K-FAC raises the test accuracy of Adam.",
         "It separates the preconditioner from width."),
        ("aggregation", kfac, "not aggregated", "A factor of aggregated inputs, ÂX, gives a higher test accuracy than one of "
         "inputs before aggregation, X.", "The gradient of the weights is a sum of g ⊗ x̄."),
        ("labels", kfac, "drawn labels", "The empirical Fisher matrix, of given labels, gives a higher test accuracy than labels "
         "drawn from the model.", "The paper defines the Fisher matrix by the model's distribution and uses given labels."),
    )  # fmt: skip
    return [
        gain(id_, statement, "claim 2 (ablations)", [(first, second)], config, undecided(reason), "exploration")
        for id_, first, second, statement, reason in claimed
    ]


ABLATIONS: Experiment[Config] = experiment_of("ablations", arms, _claims)
