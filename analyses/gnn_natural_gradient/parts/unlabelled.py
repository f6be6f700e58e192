"""Unlabelled nodes with weight λ, in the loss and in the Fisher's divisor: all combinations, several γ (claim 2)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from analyses.gnn_natural_gradient.config import Config
from analyses.gnn_natural_gradient.part import Arm, fixed, gain_claim, part_of_arms
from analyses.gnn_natural_gradient.parts.accuracy import name_of
from analyses.gnn_natural_gradient.recipe import ADAM
from curvlab.study import Claim

NAME = "unlabelled"

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
        fixed(
            arm_name(combination, gamma),
            replace(ADAM, kfac=kfac, in_loss=in_loss, in_fisher=in_fisher, gamma=gamma),
            combination=combination,
            gamma=gamma,
        )
        for combination, (kfac, in_loss, in_fisher) in COMBINATIONS.items()
        for gamma in config.gammas
    ]


def _claims(config: Config) -> list[Claim]:
    if not config.gammas:
        return []
    at = {name: tuple(arm_name(name, gamma) for gamma in config.gammas) for name in COMBINATIONS}
    kfac, adam = (name_of(method, "published") for method in ("adam-kfac", "adam"))
    claimed = (
        ("both", at["both"], (kfac,), "Unlabelled nodes in the loss and in the Fisher matrix raise the test accuracy.", "supported",
         "The paper reports it."),
        ("loss", at["loss"], (kfac,), "Unlabelled nodes in the loss alone raise the test accuracy.", "open",
         "Predicted labels sharpen what the network says already."),
        ("fisher", at["fisher"], (kfac,), "Unlabelled nodes in the Fisher's divisor alone raise the test accuracy.", "open",
         "The divisor is a schedule of damping and step size; Adam removes the latter."),
        ("share", at["both"], at["loss"], "With unlabelled nodes in the loss, those in the Fisher matrix raise the accuracy "
         "further.", "open", "The divisor is a schedule of damping and step size; Adam removes the latter."),
        ("plain", at["plain"], (adam,), "Unlabelled nodes in the loss raise the test accuracy of Adam without K-FAC.", "open",
         "Self-training is not a property of the preconditioner."),
        ("kfac", at["both"], at["plain"], "With unlabelled nodes for both, K-FAC raises the test accuracy of Adam.", "open",
         "It separates the preconditioner from self-training."),
    )  # fmt: skip
    return [
        gain_claim(f"lambda-{name}", statement, "claim 2", first, second, config, expected=expected, reason=reason)  # type: ignore[arg-type]
        for name, first, second, statement, expected, reason in claimed
    ]


PART = part_of_arms(NAME, arms, _claims)
