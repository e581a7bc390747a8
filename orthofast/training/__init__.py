"""Training: penalties, initialisers and monitors. Names only; a file is loaded on first use."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from orthofast.training.analysis import conditioning
    from orthofast.training.batchnorms import RegularizationReport, bn_regularization
    from orthofast.training.factors import Factors
    from orthofast.training.gap import GapReport, representation_gaps
    from orthofast.training.init import delta_orthogonal_, orthogonal_for_, orthogonalize_
    from orthofast.training.layers import Layer, Layers, Skipped, find_layers
    from orthofast.training.losses import (
        ConvOrthogonality,
        FramePotential,
        MeanAbsCosine,
        MutualCoherence,
        SoftOrthogonality,
        add_penalty_grad_,
        conv_orthogonality_loss,
        frame_potential_loss,
        mutual_coherence_loss,
        pii_loss,
        soft_orthogonality_loss,
    )
    from orthofast.training.monitor import Monitor
    from orthofast.training.report import LayerConditioning, Report
    from orthofast.training.sinks import Console, Csv, JsonLines, MLflow, TensorBoard, WandB
    from orthofast.training.srip import SRIP
    from orthofast.training.tracker import CovarianceTracker

__all__ = [
    "SRIP",
    "Console",
    "ConvOrthogonality",
    "CovarianceTracker",
    "Csv",
    "Factors",
    "FramePotential",
    "GapReport",
    "JsonLines",
    "Layer",
    "LayerConditioning",
    "Layers",
    "MLflow",
    "MeanAbsCosine",
    "Monitor",
    "MutualCoherence",
    "RegularizationReport",
    "Report",
    "Skipped",
    "SoftOrthogonality",
    "TensorBoard",
    "WandB",
    "add_penalty_grad_",
    "bn_regularization",
    "conditioning",
    "conv_orthogonality_loss",
    "delta_orthogonal_",
    "find_layers",
    "frame_potential_loss",
    "mutual_coherence_loss",
    "orthogonal_for_",
    "orthogonalize_",
    "pii_loss",
    "representation_gaps",
    "soft_orthogonality_loss",
]

_HOME = {
    "Console": "sinks",
    "ConvOrthogonality": "losses",
    "CovarianceTracker": "tracker",
    "Csv": "sinks",
    "Factors": "factors",
    "FramePotential": "losses",
    "GapReport": "gap",
    "JsonLines": "sinks",
    "Layer": "layers",
    "LayerConditioning": "report",
    "Layers": "layers",
    "MLflow": "sinks",
    "MeanAbsCosine": "losses",
    "Monitor": "monitor",
    "MutualCoherence": "losses",
    "RegularizationReport": "batchnorms",
    "Report": "report",
    "SRIP": "srip",
    "Skipped": "layers",
    "SoftOrthogonality": "losses",
    "TensorBoard": "sinks",
    "WandB": "sinks",
    "add_penalty_grad_": "losses",
    "bn_regularization": "batchnorms",
    "conditioning": "analysis",
    "conv_orthogonality_loss": "losses",
    "delta_orthogonal_": "init",
    "find_layers": "layers",
    "frame_potential_loss": "losses",
    "mutual_coherence_loss": "losses",
    "orthogonal_for_": "init",
    "orthogonalize_": "init",
    "pii_loss": "losses",
    "representation_gaps": "gap",
    "soft_orthogonality_loss": "losses",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'orthofast.training' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"orthofast.training.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
