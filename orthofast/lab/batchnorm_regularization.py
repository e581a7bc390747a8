"""Annamalai et al. 2022: batch normalisation as a regulariser whose strength follows the data's scale and noise.

Tables I and II and both figures, on a perceptron with batch normalisation behind every linear layer. The rate alpha of
the text is a standard deviation; the numbers that the tables print scale as variances. Both are measured.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from orthofast.lab.data import Images, load
from orthofast.lab.experiment import DATA, Experiment, Raw, Settings
from orthofast.lab.figures import Figure, Panel, Series
from orthofast.lab.fitting import accuracy, fit, optimizer_for
from orthofast.lab.missing import largest, length, minus
from orthofast.lab.nets import mlp
from orthofast.lab.verdict import Check, Number, Verdict, above, below, judge, log_slope, near, ordered, shown
from orthofast.metrics import ridge_path, ridge_shrinkage
from orthofast.training import bn_regularization

HIDDEN, RATE, BATCH = 300, 0.1, 128
STEPS = {"small": 110, "paper": 4690}  # the paper does not state its epochs; 10 of MNIST
# scale -> L1 and L2 norm, alpha
TABLE_1 = {
    2: (0.7210, 0.0322, 0.92e8),
    3: (0.3003, 0.0134, 2.2e8),
    4: (0.1717, 0.0077, 3.9e8),
    5: (0.1096, 0.0049, 5.9e8),
    6: (0.0793, 0.0035, 8.3e8),
}
# signal-to-noise ratio -> L1 and L2 norm
TABLE_2 = {100: (2.8823, 0.1286), 10: (2.5811, 0.1152), 1: (0.6090, 0.0272), 0.5: (0.3646, 0.0163)}
NORMS = {"std": "γ|w|/α, as in Eq. 12", "var": "γ|w|/α², as the tables scale"}


def _images(data: Images, train: Tensor, test: Tensor) -> Images:
    return Images(data.name, train, data.train_labels, test, data.test_labels, data.classes)


def _trained(settings: Settings, data: Images) -> tuple[dict[str, float], Tensor]:
    """Means over the hidden nodes and accuracy, and alpha of each node, after training on data as they are."""
    torch.manual_seed(settings.seed)
    model = mlp([data.train.shape[1], HIDDEN, data.classes], normalization="every", init="lecun")
    model = model.to(data.train.device)
    optimizer = optimizer_for(model, "adam", RATE)
    fit(model, data, optimizer, steps=STEPS[settings.scale], batch=BATCH, seed=settings.seed)
    layer = bn_regularization(model, [data.train], training=False).layers["0"]
    return layer.means() | {"accuracy": accuracy(model, data)}, layer.rate


def _over(raws: Sequence[Raw], key: str) -> list[list[Any]]:
    """One list a row of the table, with one number a seed."""
    return [[raw["rows"][at][key] for raw in raws] for at in raws[0]["rows"]]


def _exponents(raws: Sequence[Raw], key: str) -> list[float | None]:
    return [log_slope([float(at) for at in raw["rows"]], [row[key] for row in raw["rows"].values()]) for raw in raws]


# Table I


def table1(settings: Settings) -> Raw:
    """The hidden layer after training on images times s."""
    data = load(settings).flat()
    rows = {}
    for scale in TABLE_1:
        rows[str(scale)] = _trained(settings, _images(data, data.train * scale, data.test * scale))[0]
    return {"rows": rows}


def _verdict_t1(raws: Sequence[Raw]) -> Verdict:
    scales = list(TABLE_1)
    slopes = [log_slope(scales, [row[column] for row in TABLE_1.values()]) for column in range(3)]
    printed = [None if one is None else round(one, 3) for one in slopes]
    checks = [
        ordered("α over the data's scale", _over(raws, "rate_std"), "rises"),
        ordered("L2 norm of γ|w|/α over the scale, downwards", _over(raws, "l2_std")[::-1], "falls"),
        near("exponent of α² over the scale", _exponents(raws, "rate_var"), 2, 0.1, printed[2]),
        near("exponent of the L1 norm of γ|w|/α²", _exponents(raws, "l1_var"), -2, 0.1, printed[0]),
        near("exponent of the L2 norm of γ|w|/α²", _exponents(raws, "l2_var"), -2, 0.1, printed[1]),
        shown("exponent of α, the formula's", _exponents(raws, "rate_std"), "1 by Eq. 12; the table has no such"),
        shown("exponent of the L2 norm of γ|w|/α", _exponents(raws, "l2_std"), "-1 by Eq. 12; the table has no such"),
        shown("exponent of the weight's own L2 norm", _exponents(raws, "l2_raw"), "not shown"),
    ]
    checks += _table_rows(raws, TABLE_1, "scale")
    for at, row in TABLE_1.items():
        alphas = [raw["rows"][str(at)]["rate_var"] for raw in raws]
        checks.append(shown(f"α², scale {at}", alphas, f"{row[2] / 1e8:g}e8"))
    return judge(
        checks,
        "The printed α grows as the square of the scale: it is a variance, where the text defines its root. The "
        "caption says that the norm rises with the scale, the table that it falls. The hidden weights themselves do "
        "not depend on the scale; dividing by what they make of the data does. On MNIST with pixels of [0, 1] and ten "
        "epochs (the paper's scale) all fifteen numbers come within 0.87 and 1.4 times the printed ones, but for the "
        "power of ten of α: 10⁴ where 10⁸ is printed.",
    )


def _table_rows(raws: Sequence[Raw], table: Mapping[Any, Sequence[float]], name: str) -> list[Check]:
    def seeds(at: Any, key: str) -> list[float]:
        return [raw["rows"][str(at)][key] for raw in raws]

    norms = []
    for at, row in table.items():
        for norm, printed in zip(("L1", "L2"), row, strict=False):
            norms.append(shown(f"{norm} norm of γ|w|/α², {name} {at}", seeds(at, f"{norm.lower()}_var"), printed))
    return norms + [shown(f"accuracy on test images, {name} {at}", seeds(at, "accuracy")) for at in table]


def _drawn_t1(raws: Sequence[Raw]) -> Figure:
    scales = list(TABLE_1)
    norms = [Series(name, scales, _rows_of(raws, f"l2_{power}")) for power, name in NORMS.items()]
    norms.append(Series("printed", scales, [[row[1] for row in TABLE_1.values()]], published=True))
    rates = [
        Series("α", scales, _rows_of(raws, "rate_std")),
        Series("α²", scales, _rows_of(raws, "rate_var")),
        Series("printed", scales, [[row[2] for row in TABLE_1.values()]], published=True),
    ]
    return Figure(
        [
            Panel("scale s of the data", "mean L2 norm of hidden nodes", norms, x_log=True, y_log=True),
            Panel("scale s of the data", "mean rate of hidden nodes", rates, x_log=True, y_log=True),
        ],
        "Slopes compare; levels hang on pixels, epochs and start, which the paper leaves open. 300 hidden nodes, Adam.",
    )


def _rows_of(raws: Sequence[Raw], key: str) -> list[list[Any]]:
    return [[row[key] for row in raw["rows"].values()] for raw in raws]


# Table II


def table2(settings: Settings) -> Raw:
    """The hidden layer after training on images with noise of a given power, mean square over variance."""
    data = load(settings).flat()
    power = float(data.train.square().mean().item())
    noise = torch.Generator().manual_seed(settings.seed)
    rows = {}
    for ratio in TABLE_2:
        spread = (power / ratio) ** 0.5
        noisy = [
            images + spread * torch.randn(images.shape, generator=noise).to(images.device)
            for images in (data.train, data.test)
        ]
        rows[str(ratio)] = _trained(settings, _images(data, *noisy))[0]
    return {"rows": rows}


def _verdict_t2(raws: Sequence[Raw]) -> Verdict:
    ratios = list(TABLE_2)
    checks = []
    for power, name in NORMS.items():
        for norm, column in (("l1", 0), ("l2", 1)):
            values = _over(raws, f"{norm}_{power}")[::-1]  # from the most noise to the least
            said = " to ".join(f"{TABLE_2[ratio][column]:g}" for ratio in (ratios[-1], ratios[0]))
            checks.append(ordered(f"{norm.upper()} norm of {name}, over the ratio", values, f"rises, {said}"))
    checks += _table_rows(raws, TABLE_2, "SNR")
    return judge(
        checks,
        "Noise raises the rate, and the weight that batch normalisation makes shrinks. The caption says the opposite. "
        "The ratio is taken as mean square of the pixels over the noise's variance.",
    )


def _drawn_t2(raws: Sequence[Raw]) -> Figure:
    ratios = list(TABLE_2)
    series = [Series(name, ratios, _rows_of(raws, f"l2_{power}")) for power, name in NORMS.items()]
    series.append(Series("printed", ratios, [[row[1] for row in TABLE_2.values()]], published=True))
    return Figure(
        [Panel("signal-to-noise ratio", "mean L2 norm of hidden nodes", series, x_log=True, y_log=True)],
        "300 hidden nodes, Adam. Levels hang on pixels, epochs and start, which the paper leaves open.",
    )


# Figure 2


def figure2(settings: Settings) -> Raw:
    """alpha of each hidden node, largest first."""
    data = load(settings).flat()
    means, rates = _trained(settings, data)
    return {"rate": rates.sort(descending=True).values, "means": means}


def _verdict_f2(raws: Sequence[Raw]) -> Verdict:
    spreads: list[Number] = []
    spans: list[Number] = []
    for raw in raws:
        if any(rate is None for rate in raw["rate"]):
            spreads, spans = [*spreads, None], [*spans, None]
            continue
        rates = torch.tensor(raw["rate"], dtype=torch.float64)
        spreads.append(float((rates.std() / rates.mean()).item()))
        spans.append(float((rates.max() / rates.min()).item()))
    return judge(
        [
            above("deviation of α between nodes over its mean", spreads, 0.05, "varies across nodes (image)"),
            shown("largest α over least", spans, "image only"),
        ]
    )


def _drawn_f2(raws: Sequence[Raw]) -> Figure:
    nodes = list(range(1, len(raws[0]["rate"]) + 1))
    series = [Series("measured", nodes, [raw["rate"] for raw in raws])]
    return Figure([Panel("hidden node, by rank", "regularisation rate α", series, points=False)], "Scale 1, no noise.")


# Figure 1

CURVATURE = ((9.0, 1.0), 0.6)  # eigenvalues, angle of the first direction in radians
MINIMUM = (1.0, 1.0)
RATES = (0.0, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)


def figure1(settings: Settings) -> Raw:
    """The minimum of a quadratic loss in two dimensions under ridge penalties, by the library and by a linear solve."""
    values, angle = CURVATURE
    turn = torch.tensor(angle, dtype=torch.float64)
    directions = torch.stack(
        [torch.stack([turn.cos(), -turn.sin()]), torch.stack([turn.sin(), turn.cos()])]
    )  # (2, 2), a direction a column
    eigenvalues = torch.tensor(values, dtype=torch.float64)
    curvature = directions @ eigenvalues.diag() @ directions.T
    start = torch.tensor(MINIMUM, dtype=torch.float64)
    rates = torch.tensor(RATES, dtype=torch.float64)
    path = ridge_path(start[None], curvature, rates)[:, 0]  # (rates, 2)
    eye = torch.eye(2, dtype=torch.float64)
    solved = torch.stack([torch.linalg.solve(curvature + rate * eye, curvature @ start) for rate in rates])
    kept = (path @ directions) / (start @ directions)
    return {
        "rate": list(RATES),
        "path": path,
        "kept": kept,  # (rates, 2), share of the component along each direction
        "formula_error": (kept - ridge_shrinkage(eigenvalues, rates)).abs().max(),
        "solve_error": (path - solved).abs().max(),
    }


def _verdict_f1(raws: Sequence[Raw]) -> Verdict:
    lags = [largest([minus(low, high) for high, low in raw["kept"][1:]]) for raw in raws]
    ends = [length(raw["path"][-1]) for raw in raws]
    return judge(
        [
            below("share kept, flat direction minus steep one, largest over rates", lags, 0.0),
            below("length of the weight at the largest rate", ends, 0.2, "goes to 0"),
            below("difference from λ/(λ + α)", [raw["formula_error"] for raw in raws], 1e-12),
            below("difference from solving (R + α I) w = R w₀", [raw["solve_error"] for raw in raws], 1e-12),
        ],
        "A schematic in the paper; its formula lacks an inverse. Eigenvalues 9 and 1 are chosen here.",
    )


def _drawn_f1(raws: Sequence[Raw]) -> Figure:
    raw = raws[0]
    values = CURVATURE[0]
    shares = [
        Series(
            f"direction of eigenvalue {values[index]:g}", raw["rate"][1:], [[kept[index] for kept in raw["kept"][1:]]]
        )
        for index in range(2)
    ]
    path = [Series("regularised minimum", [point[0] for point in raw["path"]], [[point[1] for point in raw["path"]]])]
    return Figure(
        [
            Panel("rate α", "share of the component kept", shares, x_log=True),
            Panel("first weight", "second weight", path, title="from α = 0, top right, to 100"),
        ],
        "Quadratic loss in two dimensions under a ridge penalty.",
    )


_SIZE = "64-300-10 on digits, 110 steps of Adam at 0.1, instead of 784-300-10 on MNIST."

EXPERIMENTS: tuple[Experiment, ...] = (
    Experiment(
        "S3-T1",
        "Table I: rate and norms by the data's scale",
        "The rate rises and the norm of the equivalent weight falls with the data's scale.",
        table1,
        _verdict_t1,
        _drawn_t1,
        needs=DATA,
        size=_SIZE,
    ),
    Experiment(
        "S3-F1",
        "Figure 1: what a ridge penalty does to a weight",
        "Components along directions of little curvature go first as the rate grows.",
        figure1,
        _verdict_f1,
        _drawn_f1,
        statistical=False,
        size="the picture is a sketch; its formula is drawn.",
    ),
    Experiment(
        "S3-F2",
        "Figure 2: rate of each hidden node",
        "Batch normalisation regularises every node by a rate of its own.",
        figure2,
        _verdict_f2,
        _drawn_f2,
        needs=DATA,
        size=_SIZE,
    ),
    Experiment(
        "S3-T2",
        "Table II: norms by signal-to-noise ratio",
        "The norm of the equivalent weight falls as noise rises.",
        table2,
        _verdict_t2,
        _drawn_t2,
        needs=DATA,
        size=_SIZE,
    ),
)
