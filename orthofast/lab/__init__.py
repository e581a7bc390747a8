"""The papers' experiments, made of what any user of the package could write: ``python -m orthofast.lab`` runs them."""

from __future__ import annotations

from orthofast.lab.nets import ConvNet, NormalizedResidualMLP, constant_, initialize_, mlp
from orthofast.lab.resnets import CifarResNet, cifar_resnet

__all__ = ["CifarResNet", "ConvNet", "NormalizedResidualMLP", "cifar_resnet", "constant_", "initialize_", "mlp"]
