"""What a monitor measures: the table of its metrics, and the formulas from a model's tensors to one value per layer."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList

from orthofast.kernels import gram_stats, gram_stats_many
from orthofast.metrics.coherence import (
    isotropic_baseline,
    max_coherence_from,
    mean_squared_cosine_from,
    pii_from,
)
from orthofast.metrics.drift import conformal_drift
from orthofast.metrics.gram import diagonal_dominance_from
from orthofast.metrics.kronecker import kronecker_condition_number
from orthofast.metrics.spectra import condition_number, lambda_max
from orthofast.records import GramStats
from orthofast.training.covariance import SecondMoment
from orthofast.training.factors import LayerFactors
from orthofast.training.layers import Layer

WEIGHTS, GRADIENTS, ACTIVATIONS, CHANGES = "weights", "gradients", "activations", "changes"
STATISTICS, COVARIANCES = "statistics", "covariances"
SELDOM = 5  # due steps between covariances, where nothing else is asked
Failed: TypeAlias = "Callable[[Layer, Exception], None]"


@dataclass(frozen=True, slots=True)
class Measure:
    """One metric of a monitor.

    Attributes:
        name: in keys, ``orthofast/<name>/...``.
        source: what it is measured of: "weights", "gradients", "activations", "changes" of weights since the start,
            running "statistics", or "covariances" of inputs and output gradients.
        want: fields the record must hold, for metrics on records of weights.
        normalize: whether that record is of cosines or of raw dot products.
        low_is_worse: which extreme is reported.
        every: due steps from one measurement to the next.
        p: share of eigenvalues a kappa is of.
    """

    name: str
    source: str
    want: str = ""
    normalize: bool = True
    low_is_worse: bool = False
    every: int = 1
    p: float | None = None


MEASURES: dict[str, Measure] = {
    measure.name: measure
    for measure in (
        Measure("pii", WEIGHTS, "abs_sum"),
        Measure("pii_ratio", WEIGHTS, "abs_sum"),
        Measure("max_coherence", WEIGHTS, "abs_max"),
        Measure("mean_squared_cosine", WEIGHTS, "sq_sum"),
        Measure("diagonal_dominance", WEIGHTS, "row_abs", normalize=False),
        Measure("conformal_drift", CHANGES),
        Measure("weight_domination", GRADIENTS, low_is_worse=True),
        Measure("orthogonality_gap", ACTIVATIONS),
        Measure("dying_frac", ACTIVATIONS),
        Measure("full_frac", ACTIVATIONS),
        Measure("bn_rate", STATISTICS),
        *(
            Measure(name, COVARIANCES, side, every=SELDOM)
            for side in "xgF"
            for name in (f"lambda_max_{side}", *([] if side == "g" else [f"last_lambda_max_{side}"]))
        ),
        *(
            Measure(f"kappa_{side}_{100 * p:g}", COVARIANCES, side, every=SELDOM, p=p)
            for side in "xgF"
            for p in (0.5, 0.8)
        ),
        Measure("last_weight_norm", WEIGHTS, "abs_sum"),
    )
}
DEFAULT = ("pii", "pii_ratio", "max_coherence")
FIELDS = ("abs_sum", "sq_sum", "abs_max", "argmax")  # of a record, one entry an item


@dataclass(frozen=True, slots=True, eq=False)
class Part:
    """Values of one metric on a device, and the layers they belong to; float64, (len(paths),)."""

    metric: str
    paths: tuple[str, ...]
    values: Tensor


@contextmanager
def still(model: nn.Module) -> Iterator[None]:
    """Hold parametrisations in eval mode: in training mode, reading a weight under spectral_norm changes it."""
    modes = [
        (part, part.training)
        for module in model.modules()
        if isinstance(module, ParametrizationList)
        for part in module.modules()
    ]
    try:
        for module, _ in modes:
            module.training = False
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def vectors_of(layers: Sequence[Layer], failed: Failed) -> list[tuple[Layer, Tensor]]:
    """The layers' vectors as they are now, (1, n, d); one that cannot be had is handed to ``failed``."""
    found = []
    for layer in layers:
        try:
            found.append((layer, layer.vectors()))
        except Exception as error:  # noqa: BLE001 - the other layers are measured
            failed(layer, error)
    return found


def of_weights(
    measures: Sequence[Measure], layers: Sequence[tuple[Layer, Tensor]], paths: dict[str, str], failed: Failed
) -> list[Part]:
    """All metrics on records of weights: one grouped fold of cosines, and one of dot products if any asks for it."""
    parts = []
    for normalize in (True, False):
        asked = [measure for measure in measures if measure.normalize == normalize]
        if not asked:
            continue
        want = tuple(dict.fromkeys(measure.want for measure in asked))
        kept, records = _fold(layers, normalize, want, failed)
        if not records:
            continue
        names = tuple(paths[layer.name] for layer, _ in kept)
        joined = _join(records)
        for measure in asked:
            values = _formula(measure.name, joined, records, kept)
            parts.append(Part(measure.name, names[-len(values) :], values))
        if normalize or len({m.normalize for m in measures}) == 1:
            parts.append(Part("nonfinite", names, joined.nonfinite.to(torch.float64)))
            parts.append(Part("zero", names, joined.zero.to(torch.float64)))
    return parts


def of_changes(
    layers: Sequence[tuple[Layer, Tensor]], before: dict[str, Tensor], paths: dict[str, str], failed: Failed
) -> list[Part]:
    """conformal_drift of every layer that was there at the start, in its shape of then."""
    names, values = [], []
    for layer, x in layers:
        then = before.get(layer.name)
        if then is None or then.shape != x.shape:
            continue
        try:
            values.append(conformal_drift(_whole(then.to(x.device))[0], _whole(x)[0]).absolute)
            names.append(paths[layer.name])
        except Exception as error:  # noqa: BLE001 - the other layers are measured
            failed(layer, error)
    if not values:
        return []
    device = values[0].device
    return [Part("conformal_drift", tuple(names), torch.stack([value.to(device) for value in values]))]


def of_statistics(model: nn.Module, device: torch.device) -> list[Part]:
    """bn_rate: alpha of Annamalai et al. 2022 from running variances, the mean over a batch norm's neurons."""
    found = {
        path: module.running_var.to(torch.float64).sqrt().mean().to(device)
        for path, module in model.named_modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_var is not None
    }
    return [Part("bn_rate", tuple(found), torch.stack(list(found.values())))] if found else []


def of_covariances(measures: Sequence[Measure], layers: dict[str, LayerFactors]) -> dict[str, dict[str, float]]:
    """Metric -> path -> value, for a thread of its own: whole spectra where a kappa asks for them, else the largest.

    Args:
        measures: of this source.
        layers: what was added up, by path, the layer that gives the outputs last.
    """
    found: dict[str, dict[str, float]] = {measure.name: {} for measure in measures}
    last = list(layers)[-1] if layers else None
    for path, layer in layers.items():
        asked = [measure for measure in measures if path == last or not measure.name.startswith("last_")]
        kappas = {side for measure in asked if measure.p is not None for side in _sides(measure.want)}
        spectra = {
            side: moment.spectrum() if side in kappas else _largest(moment)
            for side, moment in (("x", layer.x), ("g", layer.g))
            if moment.n and any(side in _sides(measure.want) for measure in asked)
        }
        for measure in asked:
            if set(_sides(measure.want)) <= set(spectra):
                found[measure.name][path] = _of_spectra(measure, layer, spectra)
    return {name: values for name, values in found.items() if values}


def _sides(want: str) -> str:
    return "xg" if want == "F" else want


def _largest(moment: SecondMoment) -> Tensor:
    matrix = moment.compute()
    return matrix.max()[None] if matrix.dim() == 1 else lambda_max(matrix)[None]


def _of_spectra(measure: Measure, layer: LayerFactors, spectra: dict[str, Tensor]) -> float:
    values = [spectra[side] for side in _sides(measure.want)]
    if measure.p is None:
        return math.prod(float(value[0]) for value in values)
    tols = [getattr(layer, side).tol for side in _sides(measure.want)]
    if len(values) == 2:
        return float(kronecker_condition_number(values[0], values[1], measure.p, tol=(tols[0], tols[1])).value)
    return float(condition_number(values[0], measure.p, tol=tols[0]).value)


def _whole(x: Any) -> Tensor:
    """A shard's whole matrix, for metrics that need both versions at hand; one layer at a time."""
    whole: Tensor = x.full_tensor() if hasattr(x, "full_tensor") else x
    return whole


def _fold(
    layers: Sequence[tuple[Layer, Tensor]], normalize: bool, want: tuple[str, ...], failed: Failed
) -> tuple[list[tuple[Layer, Tensor]], list[GramStats]]:
    # squared lengths are float64 in every record; products of float32 need no more here
    precision = "auto" if normalize else "highest"
    try:
        records = gram_stats_many([x for _, x in layers], normalize=normalize, want=want, precision=precision)
    except Exception:  # noqa: BLE001 - one layer's fault; find it
        kept, records = [], []
        for layer, x in layers:
            try:
                records.append(gram_stats(x, normalize=normalize, want=want, precision=precision))
                kept.append((layer, x))
            except Exception as error:  # noqa: BLE001 - reported
                failed(layer, error)
        return kept, records
    return list(layers), records


def _join(records: Sequence[GramStats]) -> GramStats:
    """Records of one item each as one record of many; fields per vector stay behind."""

    def joined(name: str) -> Tensor:
        return torch.cat([getattr(record, name).to(device) for record in records])

    device = records[0].pairs.device
    whole = GramStats(pairs=joined("pairs"), zero=joined("zero"), nonfinite=joined("nonfinite"))
    for name in FIELDS:
        if getattr(records[0], name) is not None:
            setattr(whole, name, joined(name))
    return whole


def _formula(
    name: str, joined: GramStats, records: Sequence[GramStats], kept: Sequence[tuple[Layer, Tensor]]
) -> Tensor:
    """(layers,) float64."""
    if name == "last_weight_norm":
        norm_sq = records[-1].norm_sq
        assert norm_sq is not None
        return norm_sq.sum().sqrt()[None].to(joined.pairs.device)
    if name == "max_coherence":
        return max_coherence_from(joined).value
    if name == "mean_squared_cosine":
        return mean_squared_cosine_from(joined)
    if name == "diagonal_dominance":
        device = joined.pairs.device
        return torch.cat([diagonal_dominance_from(record).mean.to(device) for record in records])
    value = pii_from(joined)
    if name == "pii":
        return value
    baselines = torch.tensor([isotropic_baseline(x.shape[2]) for _, x in kept], dtype=torch.float64)
    return value / baselines.to(value.device, non_blocking=True)
