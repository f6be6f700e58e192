"""What holds for every test: one thread a process, and no test fails because the machine is slow."""

import os

import torch
from hypothesis import HealthCheck, settings

# As many processes as cores run the tests; more threads would wait for each other. The variable is for started processes.
os.environ["OMP_NUM_THREADS"] = "1"
torch.set_num_threads(1)

settings.register_profile("curvlab", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("curvlab")
