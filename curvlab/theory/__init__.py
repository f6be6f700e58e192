"""Closed-form predictions: pure functions of NumPy arrays and numbers, in float64, that know no network.

`isotropy` gives the scale α of every structure's response, `responses` and `factored` the responses
themselves from layer kernels and from back-propagated rows, `dynamics` and `cross_entropy` the outputs and
losses after t steps, `kernels` the infinite-width kernels, `forster` the Forster transform. Source, unless
noted: Karakida & Osawa (2020, arXiv 2010.00879). `fast_convergence` gives the Gram matrices, rates and
conditions of Zhang, Martens & Grosse (2019, arXiv 1905.10961), `stability` the largest stable curvature of first-order
methods (Cohen et al. 2021, arXiv 2103.00065). Imported by themselves: `block_structure`, what block-diagonal parts of a
matrix leave out, and `graph_dynamics`, the bounds and identities of Xu, Zhang, Jegelka & Kawaguchi (2021) for linear
graph networks.
"""

from curvlab.theory.cross_entropy import (
    damped_logit_step,
    fitted_loss_ratio,
    minimum_norm_gauge,
    newton_logit_step,
    newton_losses,
)
from curvlab.theory.dynamics import (
    damped_contraction,
    damped_loss_ratio,
    gd_contraction,
    kernel_modes,
    predict_test,
    predict_train,
)
from curvlab.theory.factored import (
    kfac_kernel_response,
    kfac_layer_response,
    leverages,
    unit_wise_layer_response,
)
from curvlab.theory.fast_convergence import (
    activation_limit_gram,
    complexity_term,
    condition_radius,
    general_constant_limit,
    general_largest_step,
    general_rate,
    kfac_residual,
    kfac_worst_rate,
    largest_step,
    movement,
    movement_bound,
    ngd_linear_ratio,
    ngd_rate_bound,
    path_straightness,
    stability_constant,
    total_movement,
    two_layer_gram,
    two_layer_limit_gram,
)
from curvlab.theory.forster import ForsterTransform, forster_transform
from curvlab.theory.isotropy import (
    alpha,
    best_step,
    layer_coefficients,
    published_alpha,
    stability_limit,
    tridiagonal_covered,
    tridiagonal_eigenvalues,
    tridiagonal_sigma,
)
from curvlab.theory.kernels import InfiniteWidthKernels, infinite_width_kernels, per_output
from curvlab.theory.responses import (
    block_diagonal_response,
    curvature_eigenvalues,
    exact_response,
    layer_wise_response,
    zero_damping_pole,
)
from curvlab.theory.stability import characteristic_roots, growth, sharpness_threshold

__all__ = [
    "ForsterTransform",
    "InfiniteWidthKernels",
    "activation_limit_gram",
    "alpha",
    "best_step",
    "block_diagonal_response",
    "characteristic_roots",
    "complexity_term",
    "condition_radius",
    "curvature_eigenvalues",
    "damped_contraction",
    "damped_logit_step",
    "damped_loss_ratio",
    "exact_response",
    "fitted_loss_ratio",
    "forster_transform",
    "gd_contraction",
    "general_constant_limit",
    "general_largest_step",
    "general_rate",
    "growth",
    "infinite_width_kernels",
    "kernel_modes",
    "kfac_kernel_response",
    "kfac_layer_response",
    "kfac_residual",
    "kfac_worst_rate",
    "largest_step",
    "layer_coefficients",
    "layer_wise_response",
    "leverages",
    "minimum_norm_gauge",
    "movement",
    "movement_bound",
    "newton_logit_step",
    "newton_losses",
    "ngd_linear_ratio",
    "ngd_rate_bound",
    "path_straightness",
    "per_output",
    "predict_test",
    "predict_train",
    "published_alpha",
    "sharpness_threshold",
    "stability_constant",
    "stability_limit",
    "total_movement",
    "tridiagonal_covered",
    "tridiagonal_eigenvalues",
    "tridiagonal_sigma",
    "two_layer_gram",
    "two_layer_limit_gram",
    "unit_wise_layer_response",
    "zero_damping_pole",
]
