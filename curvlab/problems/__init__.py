"""Data sets and models, as problems: a model, its loss, training and test data."""

from curvlab.problems.classification import image_problem
from curvlab.problems.files import DataUnavailable, data_folder, read_cifar10, read_idx
from curvlab.problems.images import IMAGE_SETS, ImageSet, load_images
from curvlab.problems.problem import Problem
from curvlab.problems.registry import ARGUMENTS, PROBLEMS, ProblemError, resolve, swept_arguments
from curvlab.problems.two_layer import synthetic_two_layer_problem, two_layer_problem

__all__ = [
    "ARGUMENTS",
    "IMAGE_SETS",
    "PROBLEMS",
    "DataUnavailable",
    "ImageSet",
    "Problem",
    "ProblemError",
    "data_folder",
    "image_problem",
    "load_images",
    "read_cifar10",
    "read_idx",
    "resolve",
    "swept_arguments",
    "synthetic_two_layer_problem",
    "two_layer_problem",
]
