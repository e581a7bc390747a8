"""Metrics: short formulas on records, one file per family; the table of all of them is ``catalog.METRICS``."""

from __future__ import annotations

from orthofast.metrics.backward import (
    normalization_gradient,
    residual_gradient,
)
from orthofast.metrics.batchnorm import (
    EffectiveNorms,
    OutputMoments,
    bn_equivalent_weight,
    bn_rate,
    effective_norms,
)
from orthofast.metrics.chains import (
    ChainTrace,
    GramFluctuation,
    bn_chain,
    chain_trace,
    diagonal_start,
    gram_fluctuation,
    nearly_parallel_start,
    samples_with_gap,
    vanilla_chain,
    whitened,
)
from orthofast.metrics.coherence import (
    CosineHistogram,
    MaxCoherence,
    cosine_histogram,
    isotropic_baseline,
    max_coherence,
    mean_squared_cosine,
    pii,
    welch_bound,
)
from orthofast.metrics.domination import weight_domination
from orthofast.metrics.drift import ConformalDrift, conformal_drift
from orthofast.metrics.fisher import (
    as_linear_operator,
    fisher_linear_operator,
    fisher_spectrum,
    gradient_gram,
    kronecker_factor_spectra,
    label_gradients,
    sub_fisher_spectrum,
)
from orthofast.metrics.gram import DiagonalDominance, diagonal_dominance, orthogonality_gap, singular_value_gap
from orthofast.metrics.hessians import largest_stable_step, proximal_gradient, softmax_hessian, squared_error_hessian
from orthofast.metrics.kronecker import (
    kronecker_condition_number,
    kronecker_histogram,
    kronecker_quantile,
    kronecker_spectrum,
)
from orthofast.metrics.neural_features import agop, layer_agop, neural_feature_correlation
from orthofast.metrics.neurons import FiringCounts, dying_frac, firing_counts, full_frac, merge_counts
from orthofast.metrics.regularization import (
    ConstrainedMinimum,
    constrained_minimum,
    isotropic_noise_penalty,
    noise_penalty,
    rate_from_second_moment,
    ridge_path,
    ridge_shrinkage,
)
from orthofast.metrics.rescaling import Rescaling, rescale_weights_check, rescaling_ratios
from orthofast.metrics.scales import rescale_factors
from orthofast.metrics.spectra import (
    ConditionNumber,
    condition_number,
    covariance_spectrum,
    eigenvalue_tolerance,
    lambda_max,
    marchenko_pastur_condition,
    spectrum,
)
from orthofast.metrics.theory import (
    GapBounds,
    corollary3_bound,
    gap_bounds,
    gap_contraction,
    gaussian_w2_squared,
    stationary_gap,
    theorem1_bound,
)
from orthofast.metrics.whole_matrices import (
    cosine_matrix,
    gram_matrix,
)

__all__ = [
    "ChainTrace",
    "ConditionNumber",
    "ConformalDrift",
    "ConstrainedMinimum",
    "CosineHistogram",
    "DiagonalDominance",
    "EffectiveNorms",
    "FiringCounts",
    "GapBounds",
    "GramFluctuation",
    "MaxCoherence",
    "OutputMoments",
    "Rescaling",
    "agop",
    "as_linear_operator",
    "bn_chain",
    "bn_equivalent_weight",
    "bn_rate",
    "chain_trace",
    "condition_number",
    "conformal_drift",
    "constrained_minimum",
    "corollary3_bound",
    "cosine_histogram",
    "cosine_matrix",
    "covariance_spectrum",
    "diagonal_dominance",
    "diagonal_start",
    "dying_frac",
    "effective_norms",
    "eigenvalue_tolerance",
    "firing_counts",
    "fisher_linear_operator",
    "fisher_spectrum",
    "full_frac",
    "gap_bounds",
    "gap_contraction",
    "gaussian_w2_squared",
    "gradient_gram",
    "gram_fluctuation",
    "gram_matrix",
    "isotropic_baseline",
    "isotropic_noise_penalty",
    "kronecker_condition_number",
    "kronecker_factor_spectra",
    "kronecker_histogram",
    "kronecker_quantile",
    "kronecker_spectrum",
    "label_gradients",
    "lambda_max",
    "largest_stable_step",
    "layer_agop",
    "marchenko_pastur_condition",
    "max_coherence",
    "mean_squared_cosine",
    "merge_counts",
    "nearly_parallel_start",
    "neural_feature_correlation",
    "noise_penalty",
    "normalization_gradient",
    "orthogonality_gap",
    "pii",
    "proximal_gradient",
    "rate_from_second_moment",
    "rescale_factors",
    "rescale_weights_check",
    "rescaling_ratios",
    "residual_gradient",
    "ridge_path",
    "ridge_shrinkage",
    "samples_with_gap",
    "singular_value_gap",
    "softmax_hessian",
    "spectrum",
    "squared_error_hessian",
    "stationary_gap",
    "sub_fisher_spectrum",
    "theorem1_bound",
    "vanilla_chain",
    "weight_domination",
    "welch_bound",
    "whitened",
]
