"""Daneshmand et al. 2021 on training: depth, and weights made orthogonal from data."""

from __future__ import annotations

from orthofast.lab.experiment import Experiment

EXPERIMENTS: tuple[Experiment, ...] = ()
