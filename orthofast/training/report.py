"""What a conditioning analysis found: one row a layer, as attributes, a table, a dictionary, a frame, a chart."""

from __future__ import annotations

import importlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from orthofast.errors import InputError
from orthofast.metrics.kronecker import kronecker_condition_number
from orthofast.metrics.spectra import condition_number, marchenko_pastur_condition
from orthofast.training.factors import LayerFactors
from orthofast.training.layers import Skipped
from orthofast.training.measures import still

NAN = math.nan


@dataclass(slots=True, eq=False)
class LayerConditioning:
    """One layer.

    Attributes:
        kind: "dense", "conv" or "embedding".
        d_in: length of a row of Sigma_x; d_out: of Sigma_g.
        n: rows Sigma_x is the mean of.
        terms: M, terms of the loss Sigma_g is divided by.
        calls: of the layer in one pass.
        positions: rows per entry of the batch: of a convolution its output positions.
        n_over_d: n / d_in.
        lambda_max_x: largest eigenvalue of Sigma_x; lambda_max_g: of Sigma_g; lambda_max_F: of their Kronecker
            product, which is also K-FAC's largest second moment of the weight's gradient.
        kappa_x: kappa_p by p; kappa_g, kappa_F: likewise; at least 1, NaN for a covariance of zeros.
        kappa_null: kappa_p by p that n rows of white noise of length d_in show: what kappa_x is to be held against.
        lower_bounds: which of the kappas are no more than that, such as "kappa_x[1.0]": their eigenvalue was not
            resolved.
        resolved_rank_x: eigenvalues of Sigma_x above rounding; resolved_rank_g: of Sigma_g.
        dead: neurons after this layer that fired for no example; None where none follow.
        full: those that fired for every one.
        weight_norm: Frobenius norm of the weight.
        weight_domination: largest singular value of the gradient of the mean loss on the first batch over that of the
            weight; None without targets, or where the weight is frozen or split over processes.
        spectrum_x: (d_in,) float64, largest first; spectrum_g: (d_out,).
        error: a sentence, where the layer cannot be measured: numbers are NaN.
    """

    kind: str
    d_in: int
    d_out: int
    n: int = 0
    terms: float = 0.0
    calls: int = 0
    positions: int = 0
    n_over_d: float = NAN
    lambda_max_x: float = NAN
    lambda_max_g: float = NAN
    lambda_max_F: float = NAN  # noqa: N815 - the paper's letter
    kappa_x: dict[float, float] = field(default_factory=dict)
    kappa_g: dict[float, float] = field(default_factory=dict)
    kappa_F: dict[float, float] = field(default_factory=dict)  # noqa: N815
    kappa_null: dict[float, float] = field(default_factory=dict)
    lower_bounds: tuple[str, ...] = ()
    resolved_rank_x: int = 0
    resolved_rank_g: int = 0
    dead: int | None = None
    full: int | None = None
    weight_norm: float | None = None
    weight_domination: float | None = None
    spectrum_x: Tensor | None = None
    spectrum_g: Tensor | None = None
    error: str = ""

    @property
    def resolved_rank(self) -> int:
        """Of the Kronecker product: the product of the factors' ranks."""
        return self.resolved_rank_x * self.resolved_rank_g

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers; kappas as ``kappa_x_50`` for p = 0.5."""
        plain: dict[str, Any] = {}
        for name in self.__slots__:
            value = getattr(self, name)
            if name.startswith("spectrum_"):
                continue
            if isinstance(value, dict):
                plain.update({f"{name}_{100 * p:g}": kappa for p, kappa in value.items()})
            elif name == "lower_bounds":
                plain[name] = list(value)
            else:
                plain[name] = value
        plain["resolved_rank"] = self.resolved_rank
        return plain


@dataclass(slots=True, eq=False)
class Report:
    """Conditioning of every layer, and how it was measured.

    Attributes:
        layers: by path, in the order of their first calls.
        labels: "exact", "mc" or "empirical": what the Fisher's labels are.
        n: entries of the batches seen, of all processes.
        p: shares of eigenvalues the kappas are of.
        skipped: weights that are not measured, with reasons.
        notes: what to know when reading the numbers.
        last: path of the layer that gives the outputs.
    """

    layers: dict[str, LayerConditioning]
    labels: str
    n: int
    p: tuple[float, ...]
    skipped: tuple[Skipped, ...] = ()
    notes: tuple[str, ...] = ()
    last: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Everything but the spectra, for JSON."""
        return {
            "labels": self.labels,
            "n": self.n,
            "p": list(self.p),
            "layers": {path: layer.to_dict() for path, layer in self.layers.items()},
            "skipped": [list(entry) for entry in self.skipped],
            "notes": list(self.notes),
            "last": self.last,
        }

    def to_pandas(self) -> Any:
        """One row a layer, indexed by path.

        Raises:
            InputError: if pandas is not installed.
        """
        pandas = _package("pandas", "pip install pandas")
        frame = pandas.DataFrame.from_dict({path: row.to_dict() for path, row in self.layers.items()}, orient="index")
        frame.index.name = "layer"
        return frame

    def plot(self, path: str | Path | None = None, *, p: float | None = None) -> Any:
        """Largest eigenvalues and kappa_p of all layers as a chart.

        Args:
            path: where to save it: .png, .svg or .html; None returns the chart only.
            p: which kappa; None takes the one nearest to 0.8, the paper's.

        Returns:
            an altair chart.

        Raises:
            InputError: if the extra ``report`` is not installed, the suffix is another, or p was not measured.
        """
        p = min(self.p, key=lambda known: abs(known - 0.8)) if p is None else p
        if p not in self.p:
            raise InputError(f"p needs one of {', '.join(map(str, self.p))}, which were measured, got {p!r}")
        for name in ("altair", "vl_convert"):
            _package(name, 'pip install "orthofast[report]"')
        charts = importlib.import_module("orthofast.training.charts")
        return charts.of_conditioning(self, p, None if path is None else Path(path))

    def __str__(self) -> str:
        head = ["layer", "d_in x d_out", "N/d", "lambda_x", "lambda_g", "lambda_F"]
        head += [f"kappa_{side} {100 * p:g}%" for p in self.p for side in "xgF"] + ["dead", "full", "domination"]
        lines = [[*head]]
        for path, row in self.layers.items():
            lines.append([path or "(model)", *_cells(row, self.p)])
        widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
        table = [
            "  ".join([line[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(line[1:], widths[1:], strict=True))])
            for line in lines
        ]
        said = [f"conditioning: labels={self.labels}, N={self.n}", *table]
        said += [f"{path}: {row.error}" for path, row in self.layers.items() if row.error]
        said += [f"not measured: {name} {reason}" for name, reason in self.skipped]
        return "\n".join([*said, *(f"note: {note}" for note in self.notes)])


def _cells(row: LayerConditioning, ps: Sequence[float]) -> list[str]:
    kappas = [
        (">=" if f"{name}[{p}]" in row.lower_bounds else "") + _short(getattr(row, name).get(p, NAN))
        for p in ps
        for name in ("kappa_x", "kappa_g", "kappa_F")
    ]
    largest = [_short(value) for value in (row.lambda_max_x, row.lambda_max_g, row.lambda_max_F)]
    neurons = ["-" if value is None else str(value) for value in (row.dead, row.full)]
    domination = "-" if row.weight_domination is None else _short(row.weight_domination)
    return [f"{row.d_in} x {row.d_out}", _short(row.n_over_d), *largest, *kappas, *neurons, domination]


def _short(value: float) -> str:
    return f"{value:.3g}"


def _package(name: str, cure: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise InputError(f"{name} is needed for this and not installed; {cure}") from error


def of_layer(layer: LayerFactors, ps: Sequence[float]) -> LayerConditioning:
    """Spectra and their condition numbers of what was added up for a layer."""
    row = LayerConditioning(layer.kind, layer.d_in, layer.d_out, n=layer.x.n, terms=layer.g.count)
    row.positions, row.n_over_d = layer.positions, layer.x.n / layer.d_in
    x, g = layer.x.spectrum(), layer.g.spectrum()
    row.spectrum_x, row.spectrum_g = x, g
    row.lambda_max_x, row.lambda_max_g = float(x[0]), float(g[0])
    row.lambda_max_F = row.lambda_max_x * row.lambda_max_g
    tol_x, tol_g = layer.x.tol, layer.g.tol
    bounds = []
    for p in ps:
        of_x = condition_number(x, p, tol=tol_x)
        of_g = condition_number(g, p, tol=tol_g)
        of_both = kronecker_condition_number(x, g, p, tol=(tol_x, tol_g))
        row.resolved_rank_x, row.resolved_rank_g = int(of_x.resolved_rank), int(of_g.resolved_rank)
        for name, found in (("kappa_x", of_x), ("kappa_g", of_g), ("kappa_F", of_both)):
            getattr(row, name)[p] = float(found.value)
            if bool(found.is_lower_bound):
                bounds.append(f"{name}[{p}]")
        row.kappa_null[p] = marchenko_pastur_condition(max(1, layer.x.n), layer.d_in, p)
    row.lower_bounds = tuple(bounds)
    with still(layer.module):
        weight: Any = layer.module.weight
    norm: Any = torch.linalg.vector_norm(weight.detach(), dtype=torch.float64)
    row.weight_norm = float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)
    return row
