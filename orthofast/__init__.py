"""orthofast: how orthogonal the vectors inside a neural network are. Names only; a room is loaded on first use."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from orthofast.errors import OrthofastError
    from orthofast.kernels import gram_stats
    from orthofast.kernels.dispatch import explain, use_backend
    from orthofast.metrics import (
        conformal_drift,
        cosine_histogram,
        diagonal_dominance,
        isotropic_baseline,
        max_coherence,
        orthogonality_gap,
        pii,
    )
    from orthofast.records import GramStats
    from orthofast.scan import scan_checkpoint
    from orthofast.training import Monitor, conditioning, orthogonalize_, pii_loss

    __version__: str

__all__ = [
    "GramStats",
    "Monitor",
    "OrthofastError",
    "__version__",
    "conditioning",
    "conformal_drift",
    "cosine_histogram",
    "diagonal_dominance",
    "explain",
    "gram_stats",
    "isotropic_baseline",
    "max_coherence",
    "orthogonality_gap",
    "orthogonalize_",
    "pii",
    "pii_loss",
    "scan_checkpoint",
    "use_backend",
]

_HOME = {
    "GramStats": "orthofast.records",
    "Monitor": "orthofast.training",
    "OrthofastError": "orthofast.errors",
    "conditioning": "orthofast.training",
    "conformal_drift": "orthofast.metrics",
    "cosine_histogram": "orthofast.metrics",
    "diagonal_dominance": "orthofast.metrics",
    "explain": "orthofast.kernels.dispatch",
    "gram_stats": "orthofast.kernels",
    "isotropic_baseline": "orthofast.metrics",
    "max_coherence": "orthofast.metrics",
    "orthogonality_gap": "orthofast.metrics",
    "orthogonalize_": "orthofast.training",
    "pii": "orthofast.metrics",
    "pii_loss": "orthofast.training",
    "scan_checkpoint": "orthofast.scan",
    "use_backend": "orthofast.kernels.dispatch",
}
_ROOMS = ("distributed", "errors", "kernels", "lab", "metrics", "records", "scan", "training", "views")


def __getattr__(name: str) -> Any:
    value: Any
    if name in _HOME:
        value = getattr(importlib.import_module(_HOME[name]), name)
    elif name in _ROOMS:
        value = importlib.import_module(f"orthofast.{name}")
    elif name == "__version__":
        value = _version()
    else:
        raise AttributeError(f"module 'orthofast' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*__all__, *_ROOMS})


def _version() -> str:
    """The installed version, or that of the source tree beside this package."""
    from importlib import metadata

    try:
        return metadata.version("orthofast")
    except metadata.PackageNotFoundError:
        import tomllib
        from pathlib import Path

        project = Path(__file__).parent.parent / "pyproject.toml"
        if not project.is_file():
            return "0+unknown"
        return str(tomllib.loads(project.read_text(encoding="utf-8"))["project"]["version"])
