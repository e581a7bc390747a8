"""Lu et al. 2024 on the independence of weights: all experiments, in the order of the paper."""

from __future__ import annotations

from orthofast.lab import (
    independence_ablation,
    independence_beyond,
    independence_convolutions,
    independence_lora,
    independence_optimizers,
    independence_pictures,
    independence_residual,
    independence_transformer,
    table5,
)
from orthofast.lab.experiment import Experiment

ROOMS = (
    independence_optimizers,
    independence_convolutions,
    independence_ablation,
    independence_residual,
    table5,
    independence_transformer,
    independence_lora,
    independence_pictures,
    independence_beyond,
)
EXPERIMENTS: tuple[Experiment, ...] = tuple(one for room in ROOMS for one in room.EXPERIMENTS)
