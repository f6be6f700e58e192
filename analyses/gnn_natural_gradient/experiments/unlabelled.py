"""Unlabelled nodes with weight λ, in the loss and in the Fisher's divisor: all combinations, several γ (claim 2)."""

from collections.abc import Mapping
from dataclasses import replace

from analyses.gnn_natural_gradient.arms import Arm, experiment_of
from analyses.gnn_natural_gradient.comparisons import gain
from analyses.gnn_natural_gradient.config import Config
from analyses.gnn_natural_gradient.experiments.accuracy import name_of
from analyses.gnn_natural_gradient.recipe import ADAM
from curvlab.study import Claim, Experiment, supported, undecided

COMBINATIONS: Mapping[str, tuple[bool, bool, bool]] = {
    "loss": (True, True, False),
    "fisher": (True, False, True),
    "both": (True, True, True),
    "plain": (False, True, False),
}
"""Whether there is K-FAC, λ in the loss and λ in the Fisher matrix; "plain" is Adam."""


def arm_name(combination: str, gamma: float) -> str:
    """Return the name of an arm."""
    return f"{combination} γ={gamma:g}"


def arms(config: Config) -> list[Arm]:
    """Return all combinations with published hyper-parameters, at every γ."""
    return [
        Arm(
            arm_name(combination, gamma),
            replace(ADAM, kfac=kfac, in_loss=in_loss, in_fisher=in_fisher, gamma=gamma),
            {"combination": combination, "gamma": gamma},
        )
        for combination, (kfac, in_loss, in_fisher) in COMBINATIONS.items()
        for gamma in config.gammas
    ]


def _claims(config: Config) -> list[Claim]:
    at = {name: [arm_name(name, gamma) for gamma in config.gammas] for name in COMBINATIONS}
    kfac, adam = ([name_of(method, "published")] * len(config.gammas) for method in ("adam-kfac", "adam"))
    schedule = "The divisor is a schedule of damping and step size; Adam removes the latter."
    claimed = (
        ("both", at["both"], kfac, "Unlabelled nodes in the loss and in the Fisher matrix raise the test accuracy.",
         supported("The paper reports it.")),
        ("loss", at["loss"], kfac, "Unlabelled nodes in the loss alone raise the test accuracy.",
         undecided("Predicted labels sharpen what the network says already.")),
        ("fisher", at["fisher"], kfac, "Unlabelled nodes in the Fisher's divisor alone raise the test accuracy.",
         undecided(schedule)),
        ("share", at["both"], at["loss"], "With unlabelled nodes in the loss, those in the Fisher matrix raise the accuracy "
         "further.", undecided(schedule)),
        ("plain", at["plain"], adam, "Unlabelled nodes in the loss raise the test accuracy of Adam without K-FAC.",
         undecided("Self-training is not a property of the preconditioner.")),
        ("kfac", at["both"], at["plain"], "With unlabelled nodes for both, K-FAC raises the test accuracy of Adam.",
         undecided("It separates the preconditioner from self-training.")),
    )  # fmt: skip
    return [
        gain(f"lambda-{name}", f"{statement[:-1]}, on average over the powers γ.", "claim 2",
             [*zip(first, second, strict=True)], config, expected, config.group if name == "both" else "exploration")
        for name, first, second, statement, expected in claimed
    ]  # fmt: skip


UNLABELLED: Experiment[Config] = experiment_of("unlabelled", arms, _claims)
