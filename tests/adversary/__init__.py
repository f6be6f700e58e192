"""Random models that try to make curvlab silently wrong.

    python -m tests.adversary --cases 10000 --seed 0

A case draws a model, two batches and what is asked of curvlab, takes steps between the batches, and compares with plain autograd.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
