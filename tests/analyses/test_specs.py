"""What analyses tell of the problem that they measure on."""

from analyses.specs import described
from curvlab.problems import instance


def test_a_problem_is_described_by_its_samples_network_and_loss():
    assert described(instance("digits", width=8), activation="tanh", widths=()) == {
        "problem": "digits",
        "N": "40 training samples, 50 for testing",
        "input": "64",
        "target": "1",
        "network": "Sequential with 584 parameters",
        "loss": "HalfSquaredError(reduction='mean')",
        "activation": "tanh",
    }


def test_the_samples_of_a_graph_are_its_nodes():
    assert described(instance("karate-gcn"))["N"] == "4 nodes of one graph, 20 for testing"
