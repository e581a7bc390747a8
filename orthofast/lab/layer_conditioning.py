"""Huang et al. 2020: conditioning, layer by layer."""

from __future__ import annotations

from orthofast.lab import (
    conditioning_epochs,
    conditioning_fisher,
    conditioning_layers,
    conditioning_linear,
    conditioning_residual,
    conditioning_tables,
)
from orthofast.lab.experiment import Experiment

PARTS = (
    conditioning_fisher,
    conditioning_layers,
    conditioning_residual,
    conditioning_epochs,
    conditioning_tables,
    conditioning_linear,
)
EXPERIMENTS: tuple[Experiment, ...] = tuple(one for part in PARTS for one in part.EXPERIMENTS)
