"""Trains by Lightning on a share of each batch: `torchrun … lightning_training.py FILE OPTIMISER`."""

import os
import sys

from integration_cases import flat, loader
from lightning_cases import Digits, trainer
from torchrun import leave

if __name__ == "__main__":
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    module = Digits(sys.argv[2])
    made = trainer(strategy="ddp", devices=size, use_distributed_sampler=False)
    made.fit(module, loader(6, rank=rank, size=size))
    leave(flat(module.net), sys.argv[1])
