"""Every metric as a row of data: what it reads of a record, its range, which way is better, and where it comes from."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from orthofast.metrics import coherence, drift, gram

LU_2024 = "Lu et al. 2024, Parameters Independence Index"
DANESHMAND_2021 = "Daneshmand et al. 2021, Batch normalization orthogonalizes representations"
WELCH_1974 = "Welch 1974, Lower bounds on the maximum cross correlation of signals"


@dataclass(frozen=True, slots=True)
class Metric:
    """One metric.

    Attributes:
        name: as users write it.
        function: the public call, on a weight.
        formula: the same on a record, (b,); of singular values where ``want`` is empty, or see ``versions``.
        want: fields the record must hold, as asked of ``gram_stats``.
        normalize: whether the record is of cosines or of raw dot products.
        low: least value.
        high: largest value, over all shapes.
        better: "lower", or "neither" where the metric describes and does not judge.
        paper: where it is defined.
        equation: which definition or equation of the paper.
        versions: how many versions of the weight the call takes; where 2, the formula reads a ``DriftStats``.
    """

    name: str
    function: Callable[..., Any]
    formula: Callable[..., Any]
    want: tuple[str, ...]
    normalize: bool
    low: float
    high: float
    better: str
    paper: str
    equation: str
    versions: int = 1


METRICS: dict[str, Metric] = {
    metric.name: metric
    for metric in (
        Metric(
            name="pii",
            function=coherence.pii,
            formula=coherence.pii_from,
            want=("abs_sum",),
            normalize=True,
            low=0,
            high=1,
            better="lower",
            paper=LU_2024,
            equation="Definition 1, Eq. 6",
        ),
        Metric(
            name="max_coherence",
            function=coherence.max_coherence,
            formula=coherence.max_coherence_from,
            want=("abs_max",),
            normalize=True,
            low=0,
            high=1,
            better="lower",
            paper=WELCH_1974,
            equation="k = 1",
        ),
        Metric(
            name="cosine_histogram",
            function=coherence.cosine_histogram,
            formula=coherence.cosine_histogram_from,
            want=("hist",),
            normalize=True,
            low=0,
            high=math.inf,
            better="neither",
            paper=LU_2024,
            equation="Fig. 1",
        ),
        Metric(
            name="mean_squared_cosine",
            function=coherence.mean_squared_cosine,
            formula=coherence.mean_squared_cosine_from,
            want=("sq_sum",),
            normalize=True,
            low=0,
            high=1,
            better="lower",
            paper=WELCH_1974,
            equation="k = 1",
        ),
        Metric(
            name="orthogonality_gap",
            function=gram.orthogonality_gap,
            formula=gram.orthogonality_gap_from,
            want=("sq_sum",),
            normalize=False,
            low=0,
            high=1,
            better="lower",
            paper=DANESHMAND_2021,
            equation="Eq. 2",
        ),
        Metric(
            name="singular_value_gap",
            function=gram.singular_value_gap,
            formula=gram.singular_value_gap_from,
            want=(),
            normalize=False,
            low=0,
            high=math.sqrt(2),
            better="lower",
            paper=DANESHMAND_2021,
            equation="Section 5, public code",
        ),
        Metric(
            name="diagonal_dominance",
            function=gram.diagonal_dominance,
            formula=gram.diagonal_dominance_from,
            want=("row_abs",),
            normalize=False,
            low=0,
            high=math.inf,
            better="lower",
            paper=LU_2024,
            equation="Fig. 1",
        ),
        Metric(
            name="conformal_drift",
            function=drift.conformal_drift,
            formula=drift.conformal_drift_from,
            want=(),
            normalize=True,
            low=0,
            high=1,
            better="lower",
            paper=LU_2024,
            equation="Theorem 2",
            versions=2,
        ),
    )
}
