"""Metrics: short formulas on records, one file per family; the table of all of them is ``catalog.METRICS``."""

from __future__ import annotations

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
from orthofast.metrics.drift import ConformalDrift, conformal_drift
from orthofast.metrics.gram import DiagonalDominance, diagonal_dominance, orthogonality_gap, singular_value_gap
from orthofast.metrics.kronecker import (
    kronecker_condition_number,
    kronecker_histogram,
    kronecker_quantile,
    kronecker_spectrum,
)
from orthofast.metrics.spectra import (
    ConditionNumber,
    condition_number,
    covariance_spectrum,
    eigenvalue_tolerance,
    lambda_max,
    marchenko_pastur_condition,
    spectrum,
)

__all__ = [
    "ConditionNumber",
    "ConformalDrift",
    "CosineHistogram",
    "DiagonalDominance",
    "MaxCoherence",
    "condition_number",
    "conformal_drift",
    "cosine_histogram",
    "covariance_spectrum",
    "diagonal_dominance",
    "eigenvalue_tolerance",
    "isotropic_baseline",
    "kronecker_condition_number",
    "kronecker_histogram",
    "kronecker_quantile",
    "kronecker_spectrum",
    "lambda_max",
    "marchenko_pastur_condition",
    "max_coherence",
    "mean_squared_cosine",
    "orthogonality_gap",
    "pii",
    "singular_value_gap",
    "spectrum",
    "welch_bound",
]
