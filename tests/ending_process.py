"""Fits in several processes, of which one ends in the middle: `ending_process.py FILE RANK PORT`."""

import os
import signal
import sys
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

from parts_of_data import batches, network
from torch import Tensor, distributed, nn

from curvlab.errors import StateError
from curvlab.fisher import KFAC


def ending(rank: int) -> Iterator[tuple[Tensor, Tensor]]:
    yield from batches(rank, 2)
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    file, rank, port = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    address = f"tcp://localhost:{port}"
    distributed.init_process_group("gloo", address, timedelta(seconds=60), world_size=2, rank=rank)
    try:
        KFAC.fit(network(), nn.CrossEntropyLoss(), ending(rank), group=distributed.group.WORLD)
    except StateError as error:
        file.write_text(str(error))
