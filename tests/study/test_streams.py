"""Streams of random numbers by role."""

import subprocess
import sys

import numpy as np
import pytest
import torch

from curvlab.study import generator, stream

ROLES = (("weights",), ("probes",), ("batches", 0), ("batches", 1), ("batches", "0"))
DRAWS = 4000


def draws(seed, role):
    return torch.randn(DRAWS, generator=generator(seed, *role), dtype=torch.float64)


def test_streams_of_roles_and_seeds_and_those_of_plain_seeds_are_uncorrelated_and_share_no_draw():
    plain = [torch.randn(DRAWS, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) for seed in (0, 1)]
    rows = torch.stack([draws(seed, role) for seed in (0, 1) for role in ROLES] + plain)
    correlation = torch.corrcoef(rows) - torch.eye(len(rows))
    assert correlation.abs().max() < 4.5 / DRAWS**0.5
    assert len(rows.flatten().unique()) == rows.numel()


def test_streams_of_numpy_and_torch_of_one_role_begin_with_the_same_seed():
    seed = stream(3, "graphs")
    assert 0 <= seed < 2**63
    assert generator(3, "graphs").initial_seed() == seed
    np.random.default_rng(seed)


def test_no_two_seeds_of_streams_are_equal():
    assert len({stream(seed, *role) for seed in range(500) for role in ROLES}) == 500 * len(ROLES)


def test_integers_of_other_libraries_name_the_same_stream():
    assert stream(0, "batches", np.int64(3)) == stream(0, "batches", torch.tensor(3).item()) == stream(0, "batches", 3)
    assert stream(np.int64(7), "batches") == stream(7, "batches")


def test_streams_are_the_same_in_another_process():
    code = "from curvlab.study.streams import stream; print(stream(5, 'batches', 2))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) == stream(5, "batches", 2)


@pytest.mark.parametrize(
    ("seed", "role", "error"), [(-1, ("a",), ValueError), (0, (), TypeError), (0, ("a", 0.5), Exception)]
)
def test_a_stream_needs_a_seed_and_a_role(seed, role, error):
    with pytest.raises(error):
        stream(seed, *role)
