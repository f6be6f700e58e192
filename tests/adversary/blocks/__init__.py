"""Blocks as people write layers, most of them traps; importing registers them, in the order in which they are drawn."""

from adversary.blocks import plain  # isort: skip
from adversary.blocks import sharing  # isort: skip
from adversary.blocks import branches  # isort: skip
from adversary.blocks import meeting  # isort: skip
from adversary.blocks import besides  # isort: skip
from adversary.block import BLOCKS  # isort: skip

__all__ = ["BLOCKS", "besides", "branches", "meeting", "plain", "sharing"]
