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

__all__ = [
    "ConformalDrift",
    "CosineHistogram",
    "DiagonalDominance",
    "MaxCoherence",
    "conformal_drift",
    "cosine_histogram",
    "diagonal_dominance",
    "isotropic_baseline",
    "max_coherence",
    "mean_squared_cosine",
    "orthogonality_gap",
    "pii",
    "singular_value_gap",
    "welch_bound",
]
