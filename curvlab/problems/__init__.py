"""Data sets and models, as problems: a model, its loss, training and test data."""

from curvlab.problems.classification import image_problem
from curvlab.problems.files import data_folder, read_cifar10, read_idx
from curvlab.problems.graphs import GRAPHS, LabelledGraph, graph_problem, load_graph
from curvlab.problems.identity import data_hash, digest_of, instance
from curvlab.problems.images import IMAGE_SETS, ImageSet, load_images
from curvlab.problems.problem import Problem
from curvlab.problems.registry import ARGUMENTS, PROBLEMS, ProblemError, resolve, swept_arguments
from curvlab.problems.two_layer import synthetic_two_layer_problem, two_layer_problem
from curvlab.tools.errors import DataUnavailable

__all__ = [
    "ARGUMENTS",
    "GRAPHS",
    "IMAGE_SETS",
    "PROBLEMS",
    "DataUnavailable",
    "ImageSet",
    "LabelledGraph",
    "Problem",
    "ProblemError",
    "data_folder",
    "data_hash",
    "digest_of",
    "graph_problem",
    "image_problem",
    "instance",
    "load_graph",
    "load_images",
    "read_cifar10",
    "read_idx",
    "resolve",
    "swept_arguments",
    "synthetic_two_layer_problem",
    "two_layer_problem",
]
