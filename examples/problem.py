"""A problem of one's own, which every analysis takes by its name.

cd examples && curvlab run spectrum --problem problem:moons --seeds 3
"""

import torch
from sklearn.datasets import make_moons
from torch import nn

from curvlab.problems import Problem
from curvlab.testing import check_problem


def moons(*, samples: int = 40, width: int = 16, seed: int = 0, activation: str = "tanh") -> Problem:
    """Two moons, to be told apart by a network with one hidden layer; analyses vary what the signature names."""
    points, labels = make_moons(2 * samples, noise=0.1, random_state=0)
    x, y = torch.from_numpy(points), torch.from_numpy(labels)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        nonlinearity = {"tanh": nn.Tanh, "relu": nn.ReLU}[activation]()
        model = nn.Sequential(nn.Linear(2, width), nonlinearity, nn.Linear(width, 2)).double()
    train, test = (x[:samples], y[:samples]), (x[samples:], y[samples:])
    return Problem("moons", model, nn.CrossEntropyLoss(), train, test)


if __name__ == "__main__":
    check_problem(moons)
    print(moons())
