"""One thread a process: as many processes as cores run the tests, and more threads would wait for each other."""

import os

import torch

os.environ["OMP_NUM_THREADS"] = "1"  # for the processes that tests start
torch.set_num_threads(1)
