"""Annamalai et al. 2022: batch normalisation as a regulariser whose strength follows the data's scale and noise."""

from __future__ import annotations

from orthofast.lab.experiment import Experiment

EXPERIMENTS: tuple[Experiment, ...] = ()
