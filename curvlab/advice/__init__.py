"""Which optimiser, and with which settings, on this model and these data: found by racing them."""

from curvlab.advice.advising import advise
from curvlab.advice.candidates import Candidate
from curvlab.advice.result import Advice

__all__ = ["Advice", "Candidate", "advise"]
