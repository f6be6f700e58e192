"""What curvlab raises and warns about."""

from collections.abc import Iterable

from curvlab.tools.text import unknown


class CurvlabError(Exception):
    """Base class of curvlab's own errors."""


class UnsupportedModel(CurvlabError):
    """A model, layer or loss that curvlab cannot treat exactly; the message names it and the remedy."""


class PartitionError(CurvlabError):
    """A partition of the parameters that misses some, repeats some or names unknown ones."""


class StateError(CurvlabError):
    """A structure that was asked for something its state does not hold."""


class Weightless(ValueError):
    """Targets of a batch that all have no weight, so that the mean of its loss does not exist."""


class NotPositiveDefinite(CurvlabError):
    """A structure with a negative eigenvalue where positivity is needed."""


class IllConditioned(UserWarning):
    """A system was too ill-conditioned for a plain Cholesky solve; the message says what was done instead."""


class OutsideRange(UserWarning):
    """A right-hand side has a part outside the range of a singular structure, which F⁺ ignores."""


def unknown_name(what: str, name: str, known: Iterable[str]) -> ValueError:
    """Return the error for an unknown name, with the nearest known one suggested."""
    return ValueError(unknown(what, name, known))
