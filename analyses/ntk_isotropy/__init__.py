"""Is the response of an approximate natural gradient isotropic? Karakida & Osawa 2020, claim by claim.

One step of natural gradient with an approximate Fisher moves the outputs of a wide network by `−η M ∂ℓ`. The paper's claim
is that for several approximations the response M is a multiple αI of the identity, so that they all train alike at
`η = 1/α`. Modules: `config` (options), `setting` (one network on one problem), `responses` (how a response is measured),
`descent` (steps, and runs of which both outputs are seen), `points` (what experiments share), `experiments` (their cells,
measurements and claims), `panels`.
"""

from analyses.ntk_isotropy.analysis import ANALYSIS

__all__ = ["ANALYSIS"]
